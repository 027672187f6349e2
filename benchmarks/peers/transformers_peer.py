"""transformers: `generate` on one batch of equal lengths (no padding), SDPA attention."""

import torch
import transformers


class _Engine:
    version = transformers.__version__

    def __init__(self, model: str):
        self.settings = f"bf16, sdpa, {torch.get_num_threads()} threads, torch {torch.__version__}"
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        config = transformers.GenerationConfig(
            max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        output = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return output[:, ids.shape[1] :].tolist()


def make(model: str, max_model_len: int) -> _Engine:
    return _Engine(model)
