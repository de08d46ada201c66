"""Training steps of flash-linear-attention's Gated DeltaNet hybrids: bf16 autocast, fused AdamW, fused cross-entropy.

The loss never forms all logits; softmax attention is torch's `scaled_dot_product_attention`. Nothing is recomputed in
the backward pass.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from hydrax.core.build import ConfigError
from hydrax.eval.sides.fla import compiling, quick_tuning, unguarded
from hydrax.eval.sides.workers import Mine
from hydrax.eval.timing import queued, seconds_of
from hydrax.eval.training import WARMUP, Sample
from hydrax.models.spec import BYTE_VOCABULARY, ModelConfig, resolve
from hydrax.train.config import RunConfig

DEVICE = "cuda"

RECOMPILES = 256
"""Times torch may compile a function anew: every layer is a new case, and beyond the limit it would run as it is."""


def architecture(cfg: ModelConfig) -> dict[str, Any]:
    """The arguments of the library's `GatedDeltaNetConfig`.

    Raises:
      ConfigError: layers of another kind than gdn and attn.
    """
    layers = resolve(cfg)
    options = {layer.mixer: layer.options for layer in layers}
    if "gdn" not in options or options.keys() - {"gdn", "attn"}:
        raise ConfigError("peer", "fla", f"expected layers of gdn and attn, and model.pattern is {cfg.pattern}")
    gdn, softmax = options["gdn"], [i for i, layer in enumerate(layers) if layer.mixer == "attn"]
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": len(layers),
        "vocab_size": cfg.vocab_size or BYTE_VOCABULARY,
        "tie_word_embeddings": cfg.tie,
        "intermediate_size": layers[0].ffn_dim,
        "hidden_ratio": None,
        "num_heads": gdn.heads,
        "num_v_heads": gdn.value_heads,
        "head_dim": gdn.key_dim,
        "expand_v": gdn.value_dim / gdn.key_dim,
        "allow_neg_eigval": gdn.allow_neg_eigval,
        "attn": {"layers": softmax, "num_heads": options["attn"].heads} if softmax else None,
        "use_cache": False,
        "fuse_cross_entropy": False,
        "fuse_linear_cross_entropy": True,
    }


def sample(cfg: RunConfig, steps: int, compiled: bool) -> Sample:
    """`steps` steps in this process, one queued while another runs; `compiled`: by `torch.compile`."""
    import torch
    import torch._dynamo

    quick_tuning()
    torch.manual_seed(0)
    model, optim = _model(architecture(cfg.model)), cfg.optim
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, optim.lr, (optim.b1, optim.b2), optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    tokens = _tokens(cfg)
    if compiled:
        limits = torch._dynamo.config
        limits.recompile_limit = limits.accumulated_recompile_limit = RECOMPILES
        model = torch.compile(model)

    loss: Any = None

    def step() -> torch.cuda.Event:
        """What the device passes when it is done."""
        nonlocal loss
        loss = _pull(model, tokens)
        if optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = torch.cuda.Event()
        done.record()
        return done

    with guard() as note:
        first, *_ = [seconds_of(lambda: step().synchronize()) for _ in range(WARMUP)]
        torch.cuda.reset_peak_memory_stats()
        step_seconds = queued(step, torch.cuda.Event.synchronize, steps)
    return Sample(
        device=torch.cuda.get_device_name(),
        parameters=sum(p.numel() for p in parameters),
        compile_seconds=first,
        step_seconds=step_seconds,
        loss=float(loss),
        peak_bytes=torch.cuda.max_memory_allocated(),
        note=note,
    )


def compile_share(cfg: RunConfig, mine: Mine) -> None:
    """Compiles what is `mine` of the kernels of a step, from one layer of each kind."""
    found = architecture(cfg.model)
    found["num_hidden_layers"] = 2 if found["attn"] else 1
    if found["attn"]:
        found["attn"] |= {"layers": [1]}
    with compiling(mine), contextlib.suppress(Exception):  # it will be back when the step is timed
        _pull(_model(found), _tokens(cfg))


@contextlib.contextmanager
def guard() -> Iterator[str]:
    """In there refused gradients are computed all the same; its value says so where it matters."""
    import fla.utils as facts

    wrong = facts.IS_NVIDIA_HOPPER and facts.TRITON_ABOVE_3_4_0 and not facts.TRITON_ABOVE_3_7_1
    with unguarded():
        yield "time only: the library refuses gradients with this Triton" if wrong else ""


def _model(found: dict[str, Any]) -> Any:
    import fla.layers.attn as attention
    import torch
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    attention.flash_attn_func = _attention
    with torch.device(DEVICE):
        return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**found)).float().train()


def _attention(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
    """Causal softmax attention of [B,T,H,K], in the place of a package that need not be installed."""
    from torch.nn.functional import scaled_dot_product_attention

    assert causal and window_size == (-1, -1)
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def _tokens(cfg: RunConfig) -> Any:
    import torch

    shape = cfg.train.batch_size, cfg.data.seq_len
    return torch.randint(0, cfg.model.vocab_size or BYTE_VOCABULARY, shape, device=DEVICE)


def _pull(model: Any, tokens: Any) -> Any:
    """The loss; its gradients are added to the parameters'."""
    import torch

    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()
