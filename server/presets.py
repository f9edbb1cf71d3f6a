"""The methods of the papers as settings of the running server: `python -m server --method NAME`.

A preset names the settings that make up a method; addresses, rounds, steps and learning rates are the run's own. A flag
that is given wins over it. The scoreboard (`benchmarks.federated.methods`) takes the same values, so that what is
compared there is what runs here. What a paper leaves to the size of a device is here the program that was built for it:
its slots say how many experts it holds and how many of them it can train.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from protocol.objective import Objective
from server.rules import Rules


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How experts are chosen, trained, sent and combined; the names are those of `server.config.Config`.

    Attributes
    ----------
    says : one line about it, for --help
    strategy : how slots are filled, see `server.strategies`
    initial : where the first choice comes from; without "profile" there is no round that profiles
    reprofile : training rounds until all devices profile again, 0 for never
    head_room : share of its trainable slots that a device begins with, where `structure` changes sub-models (alpha)
    gate_rate_factor : learning rate of router rows, as a share of that of the factors
    active_below, cap_share : see `server.device_objective`
    adapters : for stores of adapter experts only (`python -m export.build --adapter-experts`)
    """

    says: str
    relevance: str = "norm"
    beta: float = 0.1
    exploration: float = 0.0
    coverage: float = 0.0
    strategy: str = "value"
    initial: Literal["profile", "prior", "random"] = "profile"
    reprofile: int = 0
    structure: Literal["none", "freeze", "retry"] = "none"
    head_room: float = 0.75
    rules: Rules = Rules()
    objective: Objective = Objective()
    active_below: float = 0.0
    cap_share: float = 0.0
    uplink: Literal["float32", "int8", "int4"] = "float32"
    downlink: Literal["float32", "float16"] = "float32"
    gate_rate_factor: float = 0.3
    gate_warmup: int = 0
    adapters: bool = False

    def settings(self) -> dict[str, Any]:
        """Fields of `server.config.Config`, by name.

        >>> PRESETS["fedit"].settings()["aggregate"], PRESETS["fedit"].settings()["weighting"]
        ('factors', 'rows')
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        rules = {f.name: getattr(self.rules, f.name) for f in fields(Rules)}
        for name in ("says", "adapters", "rules"):
            del own[name]
        return {**own, **rules_as_flags(rules)}


def rules_as_flags(rules: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Rules` under the names of the flags: `lora` is --aggregate."""
    return {"aggregate" if name == "lora" else name: value for name, value in rules.items()}


FEDAVG = Rules(
    lora="factors", gate="mean", members="sent", weighting="rows", temperature=0, prior=0
)
"""FedIT's: plain means of the factors and of the router."""
MODULAR = Rules(
    lora="factors",
    gate="plain_rows",
    weighting="rows",
    temperature=0,
    prior=0,
    copy_single=True,
)
"""FedMoE's: nobody keeps, one copies, several average."""

OURS = Preset(
    says="ours, the default",
    coverage=0.5,
    strategy="coverage",
    reprofile=10,
    objective=Objective(z_loss=1e-3, label_prior=1.0, adam_eps=1e-3),
    uplink="int8",
    downlink="float16",
)
_FEDIT = Preset(
    says="the experts that the base uses most, plain means (arXiv 2305.05644)",
    strategy="prior",
    initial="prior",
    rules=FEDAVG,
)
_FEDMOE = Preset(
    says="the most used experts, sub-models that grow and shrink, modular means (arXiv 2408.11304)",
    relevance="frequency",
    beta=0.0,
    structure="freeze",
    head_room=0.9,
    rules=MODULAR,
    objective=Objective(label_smoothing=0.1, balance=0.01),
)
"""Its threshold decides how many experts each layer gets. Here a program has its slots by layer, so that a device gets
the most used experts of each layer, as many as there are slots."""
_HFEDMOE = Preset(
    says="HFedMoE as near to print as a device can hold it (arXiv 2601.00583)",
    relevance="hfedmoe",
    rules=Rules(
        lora="factors",
        gate="importance",
        members="sent",
        weighting="rows",
        temperature=0,
        prior=0,
        tau=0.02,
    ),
    objective=Objective(cap=1, cap_where="backward"),
    cap_share=0.5,
)
"""In print every token goes forward through any expert of the model and only the backward pass keeps to the budget. A
device cannot hold more experts than its program has slots for, so that the forward pass has the resident experts only;
half of them, the paper names no number, take part in a batch's backward pass."""


def _ours(says: str, lora: Literal["ffa", "alternate", "fedsa"]) -> Preset:
    return replace(OURS, says=says, rules=replace(OURS.rules, lora=lora))


PRESETS: dict[str, Preset] = {
    "ours": OURS,
    "fedit": _FEDIT,
    "fedprox": replace(
        _FEDIT, says="fedit, held near the lease (arXiv 1812.06127)", objective=Objective(prox=1e-2)
    ),
    "scaffold": replace(
        _FEDIT,
        says="fedit with control variates (arXiv 1910.06378)",
        objective=Objective(scaffold=True),
    ),
    "random": Preset(
        says="experts drawn once per device, modular means",
        strategy="random",
        initial="random",
        rules=MODULAR,
    ),
    "fedmoe": _FEDMOE,
    "hfedmoe": _HFEDMOE,
    "hfedmoe-fixed": Preset(
        says="HFedMoE's importance, with weights of trained tokens and routers by rows",
        relevance="mass",
        rules=replace(Rules(), lora="factors"),
    ),
    "fft-moe": Preset(
        says="adapter experts on a frozen base, a balance that knows devices (arXiv 2508.18663)",
        strategy="prior",
        initial="prior",
        rules=replace(FEDAVG, members="all"),
        objective=Objective(target_balance=1e-2, z_loss=1e-3),
        adapters=True,
    ),
    "flame": Preset(
        says="fewer active experts on small devices, learnt output scales (arXiv 2506.16600)",
        relevance="mass",
        beta=0.0,
        rules=replace(FEDAVG, gate="rows", members="trained", temperature=1),
        objective=Objective(active=1, output_scale=True),
        active_below=0.25,
    ),
    "ffa": _ours("ours, of a LoRA only B is trained (arXiv 2403.12313)", "ffa"),
    "alternate": _ours("ours, B and A are trained in turn (arXiv 2502.01755)", "alternate"),
    "fedsa": _ours("ours, B stays on the device (arXiv 2410.01463)", "fedsa"),
    "without-stage-1": replace(
        OURS, says="ours without profiling", strategy="prior", initial="prior", reprofile=0
    ),
    "fedmoe-without-stage-1": replace(
        _FEDMOE, says="fedmoe without profiling", strategy="prior", initial="prior"
    ),
    "fedmoe-without-stage-2": replace(
        _FEDMOE, says="fedmoe without changes of sub-models", structure="none"
    ),
}
"""By name, in the order of --help."""
