"""Options of a training step: presets that set them, and rules of which go together, both as data.

lmsys.config.TrainConfig has the options themselves, with what each does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

DTYPES = ("fp32", "bf16")
WRITTEN_BACKWARD_ATTENTION = ("flash_attention_triton", "flash_attention_torch")  # kernels that give the log-sum-exp

# --- Presets --------------------------------------------------------------------------------------

_PLAIN = {
    "written_backward": False,
    "compile": False,
    "fused_loss": False,
    "fused_rope": False,
    "merged_gate": False,
    "fused_optimizer": False,
    "residual_dtype": None,
}
# artifacts/h200/train_step_results.csv, gpt2 and gpt2-medium in bf16: fused is the fastest step, 67.2 and 95.8 ms
# (compiled blocks without these options: 82.0 and 115.2); written is within 1.5% of it, and takes a sixth less memory.
STEP_PRESETS: dict[str, dict[str, Any]] = {
    "plain": _PLAIN,
    "fused": dict.fromkeys(_PLAIN, True) | {"written_backward": False, "residual_dtype": "bf16"},
    "written": _PLAIN
    | {"written_backward": True, "fused_loss": True, "fused_optimizer": True, "residual_dtype": "bf16"},
}
# Of a preset: what gives way, to this, where it does not go with the precision or the wrapper.
YIELDING = {"fused_optimizer": False, "residual_dtype": None}

# --- Rules ----------------------------------------------------------------------------------------

OFF = (False, None)


class Rule(NamedTuple):
    """Where all of `when` hold, each fact of `needs` has one of the values there.

    Facts are the settings of train, and, as wrapper.NAME, what lmsys.parallel says of the wrapper.
    """

    when: dict[str, Any]
    needs: dict[str, tuple[Any, ...]]
    why: str  # may name facts, as {ddp_wrapper}
    instead: str  # how to go on


_WRAPPER = "train.ddp_wrapper '{ddp_wrapper}'"
_SHARDING = f"{_WRAPPER} with train.sharded_optimizer={{sharded_optimizer}}"
STEP_RULES = (
    Rule(
        {"autotune": True},
        {"compile": (True,)},
        "it is an option of train.compile",
        "set that to true as well",
    ),
    Rule(
        {"written_backward": True},
        {"compile": OFF, "fused_rope": OFF, "merged_gate": OFF},
        "a written backward pass has blocks of its own, to which that does not apply",
        "set one of them to false",
    ),
    Rule(
        {"written_backward": True},
        {"wrapper.plain_tensors": (True,)},
        f"it reads plain tensors, which {_WRAPPER} does not give",
        "use fsdp",
    ),
    Rule(
        {"written_backward": True},
        {"dtype": DTYPES},
        "it computes in fp32 or bf16",
        "set train.dtype=bf16",
    ),
    Rule(
        {"written_backward": True},
        {"attention_kernel": WRITTEN_BACKWARD_ATTENTION},
        "it needs the log-sum-exp of attention's rows",
        f"take one of {', '.join(WRITTEN_BACKWARD_ATTENTION)}",
    ),
    Rule(
        {"written_backward": True, "dtype": "bf16"},
        {"residual_dtype": (None, "bf16")},
        "it computes all of a block in one dtype",
        "leave train.residual_dtype out",
    ),
    Rule(
        {"residual_dtype": "bf16"},
        {"dtype": ("bf16",)},
        "it is for training in bf16",
        "leave train.residual_dtype out",
    ),
    Rule(
        {"fused_optimizer": True},
        {"sharded_optimizer": OFF, "wrapper.plain_tensors": (True,)},
        f"the parameters of {_SHARDING} are not plain tensors",
        "set train.fused_optimizer=false, or use flashddp or fsdp",
    ),
    Rule(
        {"sharded_optimizer": True},
        {"wrapper.sharded": OFF},
        f"it shards what {_WRAPPER} has sharded already",
        "set train.sharded_optimizer=false",
    ),
    Rule(
        {"sharded_optimizer": True},
        {"wrapper.replicated": (True,)},
        f"it shares the optimizer's state among processes and {_WRAPPER} is for one",
        "set train.ddp_wrapper=flashddp, or train.sharded_optimizer=false",
    ),
    Rule(
        {"dtype": "fp16"},
        {"sharded_optimizer": OFF, "wrapper.sharded": OFF},
        "it skips steps whose gradients overflow, which each process must see whole; "
        f"with {_SHARDING} it sees its part",
        "use train.dtype=bf16, or flashddp",
    ),
    Rule(
        {"cuda_graph": True},
        {"sharded_optimizer": OFF, "wrapper.capturable": (True,)},
        f"it captures passes that leave gradients where they were, not those of {_SHARDING}",
        "set one of them to false, or take flashddp",
    ),
    Rule(
        {"reduce_scatter_gradients": True},
        {"sharded_optimizer": (True,)},
        "it is an option of train.sharded_optimizer",
        "set that to true as well",
    ),
)


def broken(facts: Mapping[str, Any], rule: Rule) -> str | None:
    """The fact on account of which a rule does not hold."""
    if any(facts[name] != value for name, value in rule.when.items()):
        return None
    return next((name for name, values in rule.needs.items() if facts[name] not in values), None)


def with_preset(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's switches: as given, or, of those that are None, as it sets them; what yields does where it must."""
    switches: dict[str, Any] = {}
    for name, value in STEP_PRESETS[facts["step_preset"]].items():
        given = facts[name]
        switches[name] = value if given is None else given
        if given is None and name in YIELDING:
            others = facts | switches
            if any(broken(others, rule) for rule in STEP_RULES if name in rule.when):
                switches[name] = YIELDING[name]
    return switches


def check_rules(facts: Mapping[str, Any]) -> None:
    """ValueError, naming the settings, the reason and the way on, for the first rule that is broken."""
    for rule in STEP_RULES:
        if name := broken(facts, rule):
            keys = (*rule.when, "ddp_wrapper" if name.startswith("wrapper.") else name)
            *given, last = (f"train.{key}={_shown(facts[key])}" for key in keys)
            why = rule.why.format_map({key: _shown(value) for key, value in facts.items()})
            raise ValueError(f"{' with '.join(given)} does not go with {last}: {why}; {rule.instead}")


def _shown(value: Any) -> str:
    """As an override on the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)
