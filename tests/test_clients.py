"""Networks that people use, tiny and at random weights, against plain autograd in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.modules import LinearizedNetwork
from tests.slow_modules import D, relative

pytestmark = pytest.mark.ci

N, T = 5, 7


def gradients(net: nn.Module, samples: list[Any], output: Callable[[Any], Tensor]) -> Tensor:
    """(n, C, P) by one backward pass for every output of every sample."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    rows = []
    for sample in samples:
        outputs = output(net(**sample) if isinstance(sample, dict) else net(*sample)).reshape(-1)
        row = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in outputs]
        flat = [
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(r, parameters, strict=True)]
            )
            for r in row
        ]
        rows.append(torch.stack(flat))
    return torch.stack(rows)


def check(net: nn.Module, inputs: Any, output: Callable[[Any], Tensor], fast: bool | None = None) -> None:  # noqa: ANN401
    """Gram, cross, full Gram, product, kernels by layer, and the linearized network."""
    if isinstance(inputs, tuple):
        samples: list[Any] = [
            tuple({k: v[i : i + 1] for k, v in a.items()} if isinstance(a, dict) else a[i : i + 1] for a in inputs)
            for i in range(N)
        ]
        few: Any = tuple({k: v[:2] for k, v in a.items()} if isinstance(a, dict) else a[:2] for a in inputs)
    else:
        samples = [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()} for i in range(N)]
        few = {k: v[:2] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    j = gradients(net, samples, output)
    full = torch.einsum("iap,jbp->ijab", j, j)
    gram = full.diagonal(dim1=2, dim2=3).mean(-1)
    v = torch.randn(N, dtype=D)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel = EmpiricalNTK(net, output=output)
        assert relative(kernel(inputs), gram) < 1e-10
        assert relative(kernel(few, inputs), gram[:2]) < 1e-10
        assert relative(kernel.matvec(inputs, v), gram @ v) < 1e-10
        assert relative(sum(kernel.per_layer(inputs).values()), gram) < 1e-10
        assert relative(EmpiricalNTK(net, output=output, full=True)(inputs), full) < 1e-10
        twin = LinearizedNetwork(net, output=output)
        with torch.no_grad():
            for d in twin.displacement:
                d.normal_()
        along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
        assert relative(twin(inputs).detach().reshape(N, -1), j @ along) < 1e-10
        (twin(inputs).reshape(N, -1)[:, 0] * v).sum().backward()
        moved = torch.cat([(torch.zeros_like(d) if d.grad is None else d.grad).reshape(-1) for d in twin.displacement])
        assert relative(moved, torch.einsum("ip,i->p", j[:, 0], v)) < 1e-10
    of_ours = [str(w.message) for w in caught if w.category is not DeprecationWarning]
    assert of_ours == []
    if fast is not None:
        with kernel._computing(inputs) as (rows, _):
            assert isinstance(rows, GradientRows) == fast


def text(padding: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (N, T))
    mask = torch.ones(N, T, dtype=torch.long)
    if padding:
        for i, length in enumerate((T, 3, T, 5, 4)):
            mask[i, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def last_token(out: Any) -> Tensor:  # noqa: ANN401 - of transformers
    return out.logits[:, -1, :3]


def classes(out: Any) -> Tensor:  # noqa: ANN401 - of transformers
    return out.logits


TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}


def language_model(name: str, attention: str) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2)
        config._attn_implementation = attention
        return transformers.GPT2LMHeadModel(config).to(D).eval(), last_token
    if name == "bert":
        config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **TINY)
        config._attn_implementation = attention
        return transformers.BertForSequenceClassification(config).to(D).eval(), classes
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, max_position_embeddings=16, **TINY)
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config).to(D).eval(), last_token


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_language_models(name: str, attention: str, padding: bool) -> None:
    net, output = language_model(name, attention)
    check(net, text(padding), output, fast=name != "llama")  # which computes in float32 within


def test_without_a_mask_and_with_plain_arguments() -> None:
    net, output = language_model("gpt2", "sdpa")
    ids = text(False)["input_ids"]
    check(net, {"input_ids": ids}, output, fast=True)
    check(net, {"input_ids": ids, "use_cache": False}, output, fast=True)
    check(net, (ids,), output, fast=True)


def test_a_batch_encoding_is_a_mapping() -> None:
    transformers = pytest.importorskip("transformers")
    net, output = language_model("bert", "sdpa")
    inputs = text(True)
    encoding = transformers.BatchEncoding(dict(inputs))
    assert torch.equal(EmpiricalNTK(net, output=output)(encoding), EmpiricalNTK(net, output=output)(inputs))
    assert torch.equal(LinearizedNetwork(net, output=output)(encoding), torch.zeros(N, 3, dtype=D))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_vision_transformer(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=2, **TINY)
    config._attn_implementation = attention
    net = transformers.ViTForImageClassification(config).to(D).eval()
    pixels = {"pixel_values": torch.randn(N, 3, 8, 8, dtype=D)}
    check(net, pixels, classes, fast=attention == "sdpa")  # the softmax of "eager" is one of float32


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_low_rank_adapters(name: str) -> None:
    peft = pytest.importorskip("peft")
    net, output = language_model(name, "sdpa")
    target = ["c_attn"] if name == "gpt2" else ["query", "value"]
    config = peft.LoraConfig(r=2, target_modules=target, lora_dropout=0.1, fan_in_fan_out=name == "gpt2")
    adapted = peft.get_peft_model(net, config).to(D).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)  # 0 at the start: then the gradient of A is, too
    check(adapted, text(True), output)
    layers = EmpiricalNTK(adapted, output=output).per_layer(text(True))
    assert layers
    assert all("lora" in layer for layer in layers)


def forecasting_batch(network: str) -> tuple[nn.Module, dict[str, Tensor]]:
    pytest.importorskip("pytorch_forecasting")
    import pandas as pd
    from pytorch_forecasting import NBeats, TemporalFusionTransformer, TimeSeriesDataSet

    torch.manual_seed(0)
    steps = 14
    frame = pd.DataFrame({
        "series": [str(s) for s in range(N) for _ in range(steps)],
        "t": list(range(steps)) * N,
        "value": torch.randn(N * steps).tolist(),
        "known": torch.randn(N * steps).tolist(),
    })  # fmt: skip
    options: dict[str, Any] = {"max_encoder_length": 6, "max_prediction_length": 3}
    if network == "tft":
        options |= {"time_varying_known_reals": ["known"], "min_encoder_length": 6}
    data = TimeSeriesDataSet(
        frame, time_idx="t", target="value", group_ids=["series"], time_varying_unknown_reals=["value"], **options
    )
    with warnings.catch_warnings(action="ignore"):
        if network == "nbeats":
            net: nn.Module = NBeats.from_dataset(data, widths=[8, 8], num_blocks=[1, 1], backcast_loss_ratio=0.1)
        else:
            net = TemporalFusionTransformer.from_dataset(data, hidden_size=4, attention_head_size=1, output_size=1)
    x, _ = next(iter(data.to_dataloader(batch_size=N, shuffle=False)))
    floats = {k: v.to(D) if v.is_floating_point() else v for k, v in x.items() if isinstance(v, Tensor)}
    return net.to(D).eval(), floats


@pytest.mark.parametrize("network", ["nbeats", "tft"])
def test_forecasting_networks_take_one_mapping(network: str) -> None:
    net, x = forecasting_batch(network)

    def prediction(out: Any) -> Tensor:  # noqa: ANN401 - of pytorch-forecasting
        return out["prediction"].flatten(1)

    check(net, (x,), prediction)
