"""From a schedule to sampled tokens: inputs, forward, sampling."""
