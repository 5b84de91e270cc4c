"""The rule that joins the modules of a network to layers, each of which is frozen as one unit.

The adapters of all frameworks share it. Each describes its modules as plain `Module` facts, and makes its own layers of
the `Unit`s that `group_modules` returns:

- A module that runs and owns a weight of two or more dimensions is a layer.
- Norms, slopes and scales join the layer that feeds them: the one before them, unless the network's graph is known.
- Modules that are used without being called, such as the projection inside of an attention module, join the module
  around them. Where that is a container, they are unused.
- A module with weights of its own and modules inside (a convolution that holds its norm, expert tensors with their
  router) is a layer with everything inside, if it computes with its own weights; see `find_containers`. Otherwise it is
  a container.
- What a container owns itself (`cls_token`, `pos_embed`) joins the next layer that runs, and so does what runs before
  the first layer. Otherwise a frozen prefix would never close.
- Modules with tied weights are one layer.
- A layer is judged by the matrices of the module that makes it one, unless these are a small part of what freezes with
  them; see `choose_judged`.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
SMALL_PART = 1 / 8


@dataclass(frozen=True)
class Weight:
    """A trainable tensor of a module.

    Attributes:
        name: The adapter's name for it.
        key: Identity of the tensor: tied weights share one key.
        shape: Its shape.
        is_bias: Whether it is a bias. Frameworks have biases of two dimensions, too.
    """

    name: str
    key: Hashable
    shape: tuple[int, ...]
    is_bias: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether a layer can be judged by it. An empty weight never moves."""
        return len(self.shape) >= 2 and not self.is_bias and self.size > 0


@dataclass(frozen=True)
class Module:
    """What the rule needs to know about a module.

    Attributes:
        name: Unique name.
        parent: Name of the module around it, or None for the root.
        weights: The weights that it owns itself, not the ones that modules inside of it own.
        statistics: Names of everything in it that changes in a forward pass in training mode, such as the running
            statistics of a batch norm. A name may occur several times; the adapter decides what that means.
        is_norm: Whether it only normalises or scales. It is then no layer of its own, even if it owns a matrix.
        ends_layer: Whether its output is the output of the layer that it joins.
        is_list: Whether it only holds weights, for the module around it to use.
        is_operation: Whether it is an operation with weights by its type, such as a convolution. It is then a layer,
            whatever is inside of it.
        flops: Floating point operations of its forward pass.
        source: Name of the module whose output is its only input, where the network's graph is known.
    """

    name: str
    parent: str | None = None
    weights: tuple[Weight, ...] = ()
    statistics: tuple[str, ...] = ()
    is_norm: bool = False
    ends_layer: bool = False
    is_list: bool = False
    is_operation: bool = False
    flops: int = 0
    source: str | None = None


@dataclass
class Unit:
    """The modules of one layer.

    Attributes:
        name: Name of the module that makes it a layer.
        output: Name of the module whose output is the layer's output.
        members: Names of its modules.
        weights: All weights that are frozen together.
        judged: The weights whose movement decides when to freeze them.
        statistics: Names of everything that a forward pass in training mode changes.
        flops: Floating point operations of its forward pass.
    """

    name: str
    output: str
    members: list[str] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    judged: list[Weight] = field(default_factory=list)
    statistics: list[str] = field(default_factory=list)
    flops: int = 0


@dataclass(frozen=True)
class _Share:
    """A module that ran, together with the modules inside of it that belong to the same layer."""

    module: Module
    members: tuple[str, ...]
    weights: tuple[Weight, ...]
    statistics: tuple[str, ...]
    flops: int

    @property
    def matters(self) -> bool:
        return bool(self.weights or self.statistics)

    @property
    def is_layer(self) -> bool:
        return not self.module.is_norm and any(weight.is_matrix for weight in self.weights)


def group_modules(modules: Iterable[Module], ran: Iterable[str]) -> list[Unit]:
    """Join modules to layers.

    Args:
        modules: Every module of the network, the root included, in the order in which they were made.
        ran: Names of the modules that ran, by the first time that each did.

    Returns:
        The layers in execution order; none if no module that ran owns a matrix.

    Example:
        >>> conv = Module("conv", "", (Weight("conv.weight", 1, (8, 3, 3, 3)),))
        >>> norm = Module("norm", "", (Weight("norm.weight", 2, (8,)),), is_norm=True, ends_layer=True)
        >>> [unit] = group_modules([Module(""), conv, norm], ["", "conv", "norm"])
        >>> unit.name, unit.members, unit.output
        ('conv', ['conv', 'norm'], 'norm')
    """
    known = {module.name: module for module in modules}
    order = dict.fromkeys(ran)
    containers = find_containers(known, order)
    joining = _Joining(known, containers)
    for share in _collect_shares(known, order, containers):
        joining.add(share)
    return joining.finish()


def find_containers(modules: Mapping[str, Module], ran: Iterable[str]) -> set[str]:
    """Return the names of modules that are no layers because modules inside of them are.

    A module that owns matrices is a layer in spite of what is inside of it if

    - it is an operation by its type, or
    - nothing inside of it could be a layer, as where it holds a norm only, or
    - one module inside could, but the matrices that it owns itself hold more weights, and it computes with them: it has
      operations of its own, and they are no table of one entry, such as a `pos_embed` [1, positions, channels].

    With two such modules inside it is a part of the network. What it owns itself joins the first of them.
    """
    around: dict[str, list[str]] = {}
    for name in ran:
        if modules[name].weights:
            for container in _ancestors(modules, name):
                around.setdefault(container, []).append(name)
    ran = set(ran)
    return {name for name, inside in around.items() if name not in ran or not _holds(modules, name, inside)}


def _holds(modules: Mapping[str, Module], name: str, inside: Iterable[str]) -> bool:
    """Return whether a module is one layer with the modules inside of it that ran."""
    module = modules[name]
    # Frameworks list some weights twice: as the module's and as the wrapper's.
    lent = {weight.key for other in inside for weight in modules[other].weights}
    own = [weight for weight in module.weights if weight.is_matrix and weight.key not in lent]
    if module.is_norm or not own:
        return False
    layers = [modules[other] for other in inside if _has_matrix(modules[other])]
    if module.is_operation or not layers:
        return True
    used = sum(weight.size for weight in own if weight.shape[0] > 1) if module.flops else 0
    return len(layers) == 1 and used > sum(weight.size for weight in layers[0].weights)


def _has_matrix(module: Module) -> bool:
    return not module.is_norm and any(weight.is_matrix for weight in module.weights)


def choose_judged(
    judged: Iterable[T], everything: Iterable[T], size: Callable[[T], int], rank: Callable[[T], int]
) -> list[T]:
    """Return the weights by which a layer is judged, in proportion to their sizes.

    Args:
        judged: The weights that should judge the layer.
        everything: All weights of the layer that are trained, `judged` among them.
        size: Returns the number of values of a weight.
        rank: Returns its number of dimensions, with 1 for a bias.

    Returns:
        `judged`, if they hold at least `SMALL_PART`, one eighth, of the layer's values. A kernel with one input holds a
        sixth of what it is with its bias and two norms, so an operation with norms is always judged by its kernel.
        Otherwise all matrices of the layer; or all its weights if even the matrices are a small part. Weights without
        values are left out.

    Example:
        >>> choose_judged([(2, 2)], [(2, 2), (50, 4), (50,)], math.prod, len)
        [(2, 2), (50, 4)]
    """
    everything = [weight for weight in everything if size(weight)]
    total = sum(map(size, everything))
    for chosen in (list(judged), [weight for weight in everything if rank(weight) >= 2]):
        chosen = [weight for weight in chosen if size(weight)]
        if chosen and sum(map(size, chosen)) >= SMALL_PART * total:
            return chosen
    return everything


def _ancestors(modules: Mapping[str, Module], name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, the nearest first."""
    parent = modules[name].parent
    while parent is not None:
        yield parent
        parent = modules[parent].parent


def _find_user(modules: Mapping[str, Module], name: str, ran: Collection[str], containers: set[str]) -> str | None:
    """Return the name of the module that runs with this module's weights; None if they are unused."""
    around = [a for a in _ancestors(modules, name) if a in ran]
    # A layer has everything inside of it, what runs and what it uses without calling it.
    holder = next((a for a in reversed(around) if a not in containers and _has_matrix(modules[a])), None)
    if holder is not None or name in ran:
        return holder or name
    # An auxiliary head that did not run is in a container, too. A list of weights has no other way to be used.
    nearest = around[0] if around else None
    return nearest if nearest not in containers or modules[name].is_list else None


def _collect_shares(modules: Mapping[str, Module], ran: Iterable[str], containers: set[str]) -> list[_Share]:
    """Return what each module that ran contributes to a layer, in execution order."""
    ran = list(ran)
    users = {name: _find_user(modules, name, set(ran), containers) for name in modules}
    members: dict[str, list[str]] = {name: [name] for name in ran if users[name] == name}
    for name in dict.fromkeys((*ran, *modules)):
        user = users[name]
        if user is not None and user != name:
            members[user].append(name)
    return [_make_share([modules[member] for member in names], members_that_ran=set(ran)) for names in members.values()]


def _make_share(modules: list[Module], members_that_ran: Collection[str]) -> _Share:
    """Make the share of the first of these modules; the others are inside of it."""
    running = [module for module in modules if module.name in members_that_ran]
    return _Share(
        modules[0],
        tuple(module.name for module in modules),
        _list_weights(modules),
        tuple(name for module in running for name in module.statistics),
        sum(module.flops for module in running),
    )


def _list_weights(modules: Iterable[Module]) -> tuple[Weight, ...]:
    """Return the weights of the modules, each once."""
    found: dict[Hashable, Weight] = {}
    for module in modules:
        for weight in module.weights:
            found.setdefault(weight.key, weight)
    return tuple(found.values())


class _Joining:
    """Joins shares to units, in execution order."""

    def __init__(self, modules: Mapping[str, Module], containers: set[str]):
        self._modules = modules
        self._containers = containers
        self._units: list[Unit] = []
        self._waiting: list[_Share] = []  # for the next layer
        self._waited_flops: dict[str, int] = {}
        self._unit_with: dict[Hashable, Unit] = {}  # by the key of a weight
        self._unit_of: dict[str, Unit] = {}  # by the name of a module

    def add(self, share: _Share) -> None:
        """Join a share to the layer that it belongs to, or have it wait for the next one."""
        if not share.matters:
            return
        unit = None if share.module.name in self._containers else self._find_unit(share)
        if unit is None:
            self._waiting.append(share)
            return
        self._join(unit, share)
        unit.flops += share.flops

    def finish(self) -> list[Unit]:
        """Return the units; what still waits joins the last one."""
        if self._units:
            self._take_waiting(self._units[-1])
        for unit in self._units:
            judged = choose_judged(unit.judged, unit.weights, lambda w: w.size, lambda w: 2 if w.is_matrix else 1)
            if judged != unit.judged:
                # The layer is what a container computes with its own weights.
                unit.flops += self._waited_flops.get(unit.name, 0)
            unit.judged = judged
        return self._units

    def _find_unit(self, share: _Share) -> Unit | None:
        tied = next((self._unit_with[w.key] for w in share.weights if w.key in self._unit_with), None)
        if tied is not None:
            return tied
        if share.is_layer:
            return self._begin_unit(share)
        unit = self._find_feeding_unit(share.module)
        if unit is not None and share.module.ends_layer:
            unit.output = share.module.name
        return unit

    def _begin_unit(self, share: _Share) -> Unit:
        name = share.module.name
        # Not by embeddings that join from a container: the layer is judged by what it computes with.
        unit = Unit(name, name, judged=[weight for weight in share.weights if weight.is_matrix])
        self._units.append(unit)
        self._take_waiting(unit)
        return unit

    def _take_waiting(self, unit: Unit) -> None:
        for share in self._waiting:
            self._join(unit, share)
            self._waited_flops[unit.name] = self._waited_flops.get(unit.name, 0) + share.flops
        self._waiting = []

    def _join(self, unit: Unit, share: _Share) -> None:
        new = [weight for weight in share.weights if weight.key not in self._unit_with]
        unit.members += [member for member in share.members if member not in unit.members]
        unit.weights += new
        unit.statistics += share.statistics
        self._unit_with.update((weight.key, unit) for weight in new)
        self._unit_of.update(dict.fromkeys(share.members, unit))

    def _find_feeding_unit(self, module: Module) -> Unit | None:
        """Return the unit whose output the module gets through modules without weights; the last one if unknown.

        In a graph the convolution of a shortcut may run just before its neighbour, and both norms after them.
        """
        source = module.source
        while source is not None and source not in self._containers:
            if source in self._unit_of:
                return self._unit_of[source]
            source = self._modules[source].source
        return self._units[-1] if self._units else None
