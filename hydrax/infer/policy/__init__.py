"""Inference policies: which keys of a trained softmax layer are read. Each is a different function than training.

`of("streaming:window=256,sink_tokens=4")` is a policy for `hydrax.generate(..., policy=...)` and for `report.report`.
"""

import dataclasses
import re

from hydrax.core.build import ConfigError, Raw, build
from hydrax.infer.policy.accumulated import Accumulated
from hydrax.infer.policy.base import Policy as Policy
from hydrax.infer.policy.dhsa import DHSA
from hydrax.infer.policy.hip import HiP
from hydrax.infer.policy.lychee import Lychee
from hydrax.infer.policy.reuse import HyLRA
from hydrax.infer.policy.sparge import Sparge
from hydrax.infer.policy.star import Star
from hydrax.infer.policy.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {
    "accumulated": Accumulated,
    "dhsa": DHSA,
    "hip": HiP,
    "hylra": HyLRA,
    "lychee": Lychee,
    "sparge": Sparge,
    "star": Star,
    "streaming": Streaming,
}
"""The policies by name."""


def of(text: str) -> Policy:
    """The policy `<name>` or `<name>:<option>=<value>,...`, with commas or semicolons.

    Raises:
      ConfigError: an unknown name or option, or a value that is not allowed.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ConfigError("policy", name, f"expected one of {', '.join(POLICIES)}")
    options = {}
    for piece in filter(None, re.split(r"[,;](?=\s*\w+\s*=)", rest)):
        key, given, value = piece.partition("=")
        if not given:
            raise ConfigError("policy", piece, f"expected <option>=<value>; options of {name}: {_options(name)}")
        options[key.strip()] = Raw(value.strip())
    return build(POLICIES[name], options, f"policy.{name}")


def _options(name: str) -> str:
    return ", ".join(field.name for field in dataclasses.fields(POLICIES[name]))
