"""Tracing, derived fusions and binding, on a small model of our own ops with random sizes and weights."""

import pytest
import torch
from torch import nn

from deepserve.graph.bind import bind
from deepserve.graph.rewrite import fused_ops, rewrite
from deepserve.graph.show import count_ops, show
from deepserve.graph.trace import trace
from deepserve.ops.add.spec import add
from deepserve.ops.load import load_kernel, load_op
from deepserve.ops.op import Kernel
from deepserve.ops.quant_fp8.spec import quant_fp8
from deepserve.ops.rms_norm.spec import rms_norm
from deepserve.ops.silu_mul.spec import silu_mul
from deepserve.ops.write_latent.spec import write_latent

H, WIDTH, LAYERS = 48, 24, 5


class Layer(nn.Module):
    """Two halves of a decoder layer, each ending in a pending residual addition, and a cache that both read."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.Parameter(torch.randn(H)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, H) / H**0.5)
        self.latent = nn.Parameter(torch.randn(WIDTH, H) / H**0.5)
        self.gate_up = nn.Parameter(torch.randn(2 * H, H) / H**0.5)
        self.cache = torch.zeros(4, 8, WIDTH)

    def forward(self, x, residual, batch):
        residual = add(x, residual)
        x = rms_norm(residual, self.norm1, 1e-6)
        cache = write_latent(x @ self.latent.t(), self.cache, batch.slot_mapping)
        x = x + cache.sum() * 1e-3
        residual = add(x, residual)
        x = rms_norm(residual, self.norm2, 1e-6)
        return silu_mul(x @ self.gate_up.t()) @ self.down.t(), residual


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, H))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.Parameter(torch.randn(H))
        self.requires_grad_(False)

    def forward(self, batch):
        residual = load_op("embedding")(batch.token_ids, self.table)
        x = torch.zeros_like(residual)
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        return rms_norm(add(x, residual), self.norm, 1e-6)

    def logits(self, hidden):
        return hidden @ self.table.t()


class QuantizedModel(nn.Module):
    """Each layer quantises the same activations for two projections, as MLA's q_a and kv_a do."""

    def __init__(self, dtype8=torch.float8_e4m3fn):
        super().__init__()
        self.norms = nn.ParameterList(torch.randn(H) for _ in range(LAYERS)).requires_grad_(False)
        self.dtype8 = dtype8

    def project(self, x):
        x8, scales = quant_fp8(x, 16, False, self.dtype8)
        return (x8.float().view(-1, H // 16, 16) * scales.unsqueeze(-1)).view(-1, H)

    def forward(self, x):
        residual = torch.zeros_like(x)
        for norm in self.norms:
            residual = add(x, residual)
            normed = rms_norm(residual, norm, 1e-6)
            x = self.project(normed) + self.project(normed)
        return self.project(silu_mul(torch.cat((x, residual), -1)))


class Inputs:
    def __init__(self, num_tokens):
        self.token_ids = torch.randint(50, (num_tokens,))
        self.slot_mapping = torch.randperm(32)[:num_tokens]


def references(graph):
    return {name: load_kernel(name, "reference") for name in count_ops(graph)}


def test_trace_merges_what_every_layer_reads():
    graph = trace(Model())
    reads = [node for node in graph.graph.nodes if node.target is getattr]
    assert sorted(node.args[1] for node in reads) == ["slot_mapping", "token_ids"]
    assert count_ops(graph) == {
        "rms_norm": 2 * LAYERS + 1,
        "add": 2 * LAYERS + 1,
        "write_latent": LAYERS,
        "silu_mul": LAYERS,
        "embedding": 1,
    }


def test_trace_keeps_a_repeated_write():
    class Twice(nn.Module):
        cache = torch.zeros(2, 2, 4)

        def forward(self, x, slots):
            return write_latent(x, self.cache, slots), write_latent(x, self.cache, slots)

    assert count_ops(trace(Twice())) == {"write_latent": 2}


def test_fusions_cross_layers_and_are_exact():
    model, batch = Model(), Inputs(6)
    expected = model(batch)
    graph = trace(model)
    assert rewrite(graph, {"add_rms_norm"}) == {"add_rms_norm": 2 * LAYERS + 1}
    assert "add" not in count_ops(graph)
    assert torch.equal(bind(graph, references(graph))(batch), expected)


def test_switched_off_means_unchanged():
    model, batch = Model(), Inputs(3)
    graph = trace(model)
    before = count_ops(graph)
    assert rewrite(graph, set()) == {}
    assert count_ops(graph) == before
    assert torch.equal(bind(graph, references(graph))(batch), model(batch))


@pytest.mark.parametrize("dtype8", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_the_widest_pattern_wins_and_narrower_ones_take_over(dtype8):
    model, x = QuantizedModel(dtype8), torch.randn(4, H)
    everything = set(fused_ops())
    expected = {
        (): {"add_rms_norm_quant_fp8": LAYERS, "silu_mul_quant_fp8": 1, "rms_norm_quant_fp8": 0, "add_rms_norm": 0},
        ("add_rms_norm_quant_fp8",): {"rms_norm_quant_fp8": LAYERS, "silu_mul_quant_fp8": 1, "add_rms_norm": 0},
        ("add_rms_norm_quant_fp8", "rms_norm_quant_fp8"): {"add_rms_norm": LAYERS, "silu_mul_quant_fp8": 1},
    }
    for off, fired in expected.items():
        graph = trace(model)
        assert {name: count for name, count in rewrite(graph, everything - set(off)).items() if name in fired} == fired
        assert torch.equal(bind(graph, references(graph))(x), model(x))


def test_quantisation_shared_by_two_projections_is_done_once():
    assert count_ops(trace(QuantizedModel()))["quant_fp8"] == LAYERS + 1


def test_a_value_used_elsewhere_is_not_fused_away():
    class Leak(nn.Module):
        def forward(self, x, w):
            normed = rms_norm(x, w, 1e-6)
            return quant_fp8(normed, 16, False, torch.float8_e4m3fn)[0].float() + normed

    graph = trace(Leak())
    assert rewrite(graph, {"rms_norm_quant_fp8"}) == {"rms_norm_quant_fp8": 0}


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="no fused op is called rms_norm"):
        rewrite(trace(Model()), {"rms_norm"})


def test_binding_calls_the_given_kernels():
    model, batch = Model(), Inputs(4)
    graph = trace(model)
    calls = []

    def counted(gate_up):
        calls.append(gate_up.shape)
        return load_op("silu_mul").reference(gate_up)

    kernels = references(graph) | {"silu_mul": Kernel("silu_mul", "counted", counted)}
    assert torch.equal(bind(graph, kernels)(batch), model(batch))
    assert calls == [(4, 2 * H)] * LAYERS


def test_binding_needs_a_kernel_for_every_op():
    graph = trace(Model())
    kernels = references(graph)
    del kernels["add"]
    with pytest.raises(KeyError, match="add"):
        bind(graph, kernels)


def test_binding_sees_caches_and_weights_of_its_own_time():
    model, batch = Model(), Inputs(5)
    graph = trace(model)
    for layer in model.layers:
        layer.cache = torch.zeros(4, 8, WIDTH)
        layer.norm1.copy_(torch.randn(H))
    bound = bind(graph, references(graph))
    out = bound(batch)
    written = [layer.cache.clone() for layer in model.layers]
    for layer in model.layers:
        layer.cache.zero_()
    assert torch.equal(out, model(batch))
    assert all(torch.equal(layer.cache, copy) for layer, copy in zip(model.layers, written, strict=True))
    assert all(copy.any() for copy in written)


def test_packing_rewrites_only_the_weight_of_its_op():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(H), requires_grad=False)

        def forward(self, x):
            return rms_norm(x, self.weight, 1e-6) + rms_norm(x + 1, self.weight, 1e-6) + self.weight

    model, x = Shared(), torch.randn(3, H)
    packed = []

    def pack(weight):
        packed.append(weight)
        return weight * 2

    kernel = Kernel("rms_norm", "doubled", lambda x, w, eps: rms_norm.reference(x, w / 2, eps), {"weight": pack})
    assert torch.equal(bind(trace(model), {"rms_norm": kernel})(x), model(x))
    assert len(packed) == 1


def test_slices_of_weights_are_taken_once():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2 * H, H), requires_grad=False)

        def forward(self, x, rows):
            return x * self.weight[:H, 0] + x * self.weight[H:][1:, None][..., 0, 2].sum() + self.weight[rows].sum()

    model, x, rows = Halves(), torch.randn(3, H), torch.tensor([1, 5])
    bound = bind(trace(model), {})
    assert torch.equal(bound(x, rows), model(x, rows))
    assert bound.source.count("[") == 1, bound.source
    model.weight.mul_(2)  # slices are views: weights written later are seen
    assert torch.equal(bound(x, rows), model(x, rows))


def test_another_method_can_be_traced():
    model, hidden = Model(), torch.randn(3, H)
    graph = trace(model, "logits")
    assert torch.equal(bind(graph, {})(hidden), model.logits(hidden))


def test_a_meta_model_traces():
    with torch.device("meta"):
        model = Model()
    graph = trace(model)
    before = count_ops(graph)
    fired = rewrite(graph, {"add_rms_norm"})
    text = show(before, count_ops(graph), fired)
    assert f"add_rms_norm fired {2 * LAYERS + 1} times" in text
    assert text.splitlines()[1].split() == ["add", str(2 * LAYERS + 1), "0"]
