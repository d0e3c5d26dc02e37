"""Which parts of a two-tower method are trained, and at which rates.

A tower has two parts: the trunk, and the projection into the shared space. What else a method trains, such as a head or the temperature, is
new. A part that starts from weights (`Tower.starts`) may be frozen, and has another rate than a new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coalign.config import PRETRAINED_LR, TrainConfig
from coalign.errors import UserError
from coalign.method import Method
from coalign.networks.blocks import find_blocks
from coalign.networks.towers.spec import Tower, find_towers
from coalign.optim import Rate

TRUNK, PROJECTION, REST = "trunk", "projection", "rest"
RANDOM = "random values"


@dataclass(frozen=True)
class TunedPart:
    """A part of a method, for the dry run."""

    role: str
    part: str
    starts: str  # what its weights start from; "random values"
    tuning: str  # "trained", "frozen", or which blocks are trained
    trained: int  # parameters
    frozen: int
    lr: float | None  # peak rate; None: frozen

    @property
    def is_pretrained(self) -> bool:
        return self.starts != RANDOM


class Tuning:
    """Freezes parts of a method as configured, and knows the rates of the others.

    Build it before the weights are sharded. Raises UserError if the settings do not fit the method, or leave nothing to train.
    """

    def __init__(self, method: Method, config: TrainConfig) -> None:
        self.method, self.config = method, config
        towers = {role: getattr(method, role, None) for role in ("image", "text")}
        self.towers = {role: tower for role, tower in towers.items() if isinstance(tower, Tower)}
        self._waiting: list[nn.Parameter] = []  # frozen in the head phase only
        _check(self)
        for role in self.towers:
            for parameter in self._frozen_parameters(role):
                parameter.requires_grad_(False)
        self._set_modes(heads_only=False)
        _check_trained(self)

    # ------------------------------------------------------------ parts

    def tuning(self, role: str) -> str:
        return str(getattr(self.config, f"{role}_tuning"))

    def projection(self, role: str) -> list[nn.Parameter]:
        module = self.method.projections().get(role)
        return [] if module is None else list(module.parameters())

    def trunk(self, role: str) -> list[nn.Parameter]:
        return trunk_parameters(self.towers[role])

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters that are trained, by role. Those that wait in the head phase are among them."""
        waiting = set(self._waiting)
        return {
            role: [p for p in members if p.requires_grad or p in waiting] for role, members in self._members().items()
        }

    def _members(self) -> dict[str, list[nn.Parameter]]:
        """Returns all parameters by role, trained or not."""
        groups = {role: list(parameters) for role, parameters in self.method.parameter_groups().items()}
        for role, tower in self.towers.items():  # a method may leave out what it does not train
            groups[role] = list(dict.fromkeys([*groups.get(role, ()), *tower.parameters()]))
        return groups

    def rates(self) -> dict[Tensor, Rate]:
        """Returns the rates of the parameters. It is empty if all have the rate of their role."""
        decays = {role: getattr(self.config, f"{role}_layer_decay") for role in self.towers}
        starts = any(tower.starts for tower in self.towers.values())
        if not starts and all(decay == 1 for decay in decays.values()):
            return {}
        waits = self.config.head_epochs > 0
        rates: dict[Tensor, Rate] = {}
        for role, tower in self.towers.items():
            depths = block_depths(tower)
            for parameter, depth in depths.items():
                scale = decays[role] ** depth
                rates[parameter] = Rate(TRUNK, TRUNK not in tower.starts, scale, waits and TRUNK in tower.starts)
            is_new = PROJECTION not in tower.starts
            rates |= {p: Rate(PROJECTION, is_new, waits=waits and not is_new) for p in self.projection(role)}
        for role, parameters in self._members().items():
            # the temperature belongs to weights of whole models
            rest = Rate(REST if role in self.towers else "", is_new=role != "scale" or not self._starts_whole())
            rates |= {parameter: rest for parameter in parameters if parameter not in rates}
        return rates

    def num_trained(self) -> dict[str, int]:
        """Returns the number of trained parameters by role."""
        return {role: sum(p.numel() for p in parameters) for role, parameters in self.groups().items()}

    def num_frozen(self) -> dict[str, int]:
        """Returns the number of frozen parameters by role."""
        totals = {role: sum(p.numel() for p in members) for role, members in self._members().items()}
        return {role: totals[role] - trained for role, trained in self.num_trained().items()}

    def warning(self) -> str | None:
        """Returns a sentence on the encoders that start from weights and have a rate that would destroy them; None if there are none."""
        limit = 10 * PRETRAINED_LR
        rates: dict[str, float] = {}
        for row in self.table():
            is_own = row.starts == str(self.config.init_from)  # a run from scratch continues at its own rates
            if row.role in self.towers and row.is_pretrained and row.lr is not None and row.lr > limit and not is_own:
                rates[row.role] = max(row.lr, rates.get(row.role, 0.0))
        if not rates:
            return None
        several = len(rates) > 1
        locks = " ".join(f"--{role}-tuning locked" for role in rates)
        return (
            f"The learning rate of the pretrained {' and '.join(rates)} {'encoders' if several else 'encoder'}, {max(rates.values()):g}, "
            f"is above {limit:g}, which destroys {'their' if several else 'its'} weights; use --lr {PRETRAINED_LR:g}, or lock "
            f"{'them' if several else 'it'} with {locks}."
        )

    def table(self) -> list[TunedPart]:
        """Returns all parts with parameters, in the order of the roles."""
        rates, rows = self.rates(), []
        for role, parameters in self._members().items():
            by_part: dict[str, list[nn.Parameter]] = {}
            for parameter in parameters:
                by_part.setdefault(rates.get(parameter, Rate()).part, []).append(parameter)
            for part, members in by_part.items():
                rows.append(self._row(role, part, members, rates))
        return rows

    def _row(self, role: str, part: str, members: Sequence[nn.Parameter], rates: dict[Tensor, Rate]) -> TunedPart:
        trained = [p for p in members if p.requires_grad]
        numbers = sum(p.numel() for p in trained), sum(p.numel() for p in members if not p.requires_grad)
        tower = self.towers.get(role)
        starts = tower.starts.get(part) if tower else None
        if role == "scale" and self._starts_whole():
            starts = next(iter(self.towers.values())).starts[TRUNK]
        peaks = [
            rate.scale * self.config.optimizer.for_role(role, rate.is_new).lr
            for rate in (rates.get(p, Rate()) for p in trained)
        ]
        tuning = "trained" if trained else "frozen"
        if numbers[0] and numbers[1]:
            tuning = f"last {self.tuning(role).removeprefix('last:')} blocks trained"
        elif trained and any(rates.get(p, Rate()).waits for p in trained):
            tuning = f"trained after {self.config.head_epochs:g} epochs"
        return TunedPart(role, part, starts or RANDOM, tuning, *numbers, max(peaks) if peaks else None)

    def _starts_whole(self) -> bool:
        """Whether both towers start from one model's weights with all their parts."""
        is_composed = self.config.image_tower or self.config.text_tower
        if not self.towers or (is_composed and self.config.init_from is None):
            return False
        return all(
            TRUNK in tower.starts and (PROJECTION in tower.starts or not self.projection(role))
            for role, tower in self.towers.items()
        )

    # ------------------------------------------------------------ freezing

    def set_heads_only(self, on: bool) -> None:
        """Freezes all parts that start from weights (the head phase), or trains them as configured again."""
        for parameter in self._waiting:
            parameter.requires_grad_(True)
        self._waiting = []
        if on:
            rates = self.rates()
            groups = self._members().values()
            self._waiting = [p for group in groups for p in group if p.requires_grad and rates.get(p, Rate()).waits]
        for parameter in self._waiting:
            parameter.requires_grad_(False)
        self._set_modes(on)

    def _frozen_parameters(self, role: str) -> Iterator[nn.Parameter]:
        tower, tuning = self.towers[role], self.tuning(role)
        if tuning == "full":
            return
        trained = set(self._trained_trunk(role, tower))
        yield from (parameter for parameter in self.trunk(role) if parameter not in trained)
        if tuning == "locked" and PROJECTION in tower.starts:
            yield from self.projection(role)

    def _trained_trunk(self, role: str, tower: Tower) -> list[nn.Parameter]:
        """Returns the trained parameters of the trunk of a tower: the role's, or a teacher of it."""
        tuning, depths = self.tuning(role), block_depths(tower)
        if tuning in ("full", "locked"):
            return list(depths) if tuning == "full" else []
        number = int(tuning.removeprefix("last:"))
        if number == 0 and not isinstance(self.method.projections().get(role), nn.Identity):
            return []
        return [parameter for parameter, depth in depths.items() if depth <= number]  # depth 0 may hold the projection

    def _set_modes(self, heads_only: bool) -> None:
        """Keeps all frozen modules of trunks, also of teachers, in evaluation mode from now on."""
        for tower in find_towers(self.method):
            for role, student in self.towers.items():
                if type(student) is type(tower):
                    waits = heads_only and TRUNK in student.starts
                    trained = set() if waits else set(self._trained_trunk(role, tower))
                    is_full = len(trained) == len(trunk_parameters(tower))
                    tower.frozen = () if is_full else tuple(_without(_trunk(tower), trained))
                    tower.train(tower.training)


def _trunk(tower: Tower) -> list[nn.Module]:
    return [child for name, child in tower.named_children() if name != "projection"]


def trunk_parameters(tower: Tower) -> list[nn.Parameter]:
    """Returns the parameters of a tower without its projection."""
    return [parameter for child in _trunk(tower) for parameter in child.parameters()]


def _without(modules: Sequence[nn.Module], trained: set[nn.Parameter]) -> Iterator[nn.Module]:
    """Yields the largest modules that contain no trained parameter."""
    for module in modules:
        is_trained = [parameter in trained for parameter in module.parameters()]
        if not any(is_trained):
            yield module
        elif not all(is_trained):
            yield from _without(list(module.children()), trained)


def blocks(tower: Tower) -> list[nn.Module]:
    """Returns the blocks of a tower's trunk."""
    return [block for child in _trunk(tower) for block in find_blocks(child)]


def block_depths(tower: Tower) -> dict[nn.Parameter, int]:
    """Returns the depth of the parameters of a tower's trunk, counted from the projection: 0 after the last block, 1 in the last block, …,
    and in the embedding one more than in the first block. Layers between two blocks, such as a downsampling, count to the second.

    These are the layers of BEiT's learning rate decay. Without blocks, all depths are 0.
    """
    own = blocks(tower)
    index_of = {parameter: index for index, block in enumerate(own) for parameter in block.parameters()}
    depths, index = {}, -1
    for parameter in trunk_parameters(tower):
        if parameter in index_of:
            index = index_of[parameter]
            depths[parameter] = len(own) - index
        else:
            depths[parameter] = len(own) - index - 1 if index >= 0 else len(own) + 1
    return depths if own else dict.fromkeys(depths, 0)


# ---------------------------------------------------------------- checks


def _check(tuning: Tuning) -> None:
    """Raises UserError if a setting does not fit the towers."""
    config = tuning.config
    given = {"--head": config.head != "linear", "--head-epochs": config.head_epochs > 0}
    for role in ("image", "text"):
        given[f"--{role}-tuning"] = tuning.tuning(role) != "full"
        given[f"--{role}-layer-decay"] = getattr(config, f"{role}_layer_decay") != 1
    if not tuning.towers and any(given.values()):
        option = next(name for name, is_given in given.items() if is_given)
        raise UserError(
            f"{option} needs a method with an image and a text encoder, such as clip; {tuning.config.method} has one encoder for both."
        )
    for role, tower in tuning.towers.items():
        number, how = len(blocks(tower)), tuning.tuning(role)
        if how != "full" and TRUNK not in tower.starts:
            raise UserError(
                f"--{role}-tuning {how} needs pretrained weights, but the {role} encoder starts from random values; add --pretrained or "
                f"--{role}-tower, or train it with --{role}-tuning full."
            )
        if how.startswith("last:") and int(how.removeprefix("last:")) > number:
            raise UserError(
                f"--{role}-tuning {how} is more than the {number} blocks of the {role} encoder; use a smaller number, or full."
            )
        if given[f"--{role}-layer-decay"] and not number:
            raise UserError(
                f"--{role}-layer-decay needs an encoder made of blocks, but the {role} encoder has none; omit it."
            )


def _check_trained(tuning: Tuning) -> None:
    """Raises UserError if no part of the encoders is trained, or none in the head phase or after it."""
    config, groups, rates = tuning.config, tuning.groups(), tuning.rates()
    encoders = [p for role in tuning.towers for p in (*tuning.trunk(role), *tuning.projection(role))]
    if tuning.towers and not any(p.requires_grad for p in encoders) and not _has_gradient(tuning):
        raise UserError(
            f"Nothing is left to train: --image-tuning {config.image_tuning} and --text-tuning {config.text_tuning} freeze both "
            "encoders and their pretrained projections; train the projection of one with last:0, or new ones with --head mlp."
        )
    if not config.head_epochs:
        return
    if config.head_epochs >= config.epochs:
        raise UserError(
            f"--head-epochs is {config.head_epochs:g}, but must be less than --epochs, {config.epochs:g}, so that the encoders are trained."
        )
    waiting = [rates.get(p, Rate()).waits for group in groups.values() for p in group]
    if not any(waiting):
        raise UserError("--head-epochs is for pretrained encoders that are trained afterwards, but none is; omit it.")
    if not any(not rates.get(p, Rate()).waits for role in tuning.towers for p in groups[role]):
        raise UserError(
            "--head-epochs trains new parts first, but all parts of both encoders start from weights; omit it, or add --head mlp."
        )


def _has_gradient(tuning: Tuning) -> bool:
    """Whether embeddings have a gradient, by a method's own heads. Runs both encoders on one sample."""
    method, size = tuning.method, tuning.towers["image"].image_size or 1
    image = method.encode_image(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    text = method.encode_text(torch.ones(1, 2, dtype=torch.long), torch.tensor([2]))
    return any(
        tensor.requires_grad
        for embeds in (image, text)
        for tensor in (embeds if isinstance(embeds, tuple) else (embeds,))
    )
