"""What the core knows of a method's config: its class, its keys, where it lists modules to leave alone.

Methods that transformers has a config class for use that class as it is. A method of its own subclasses
:class:`MethodConfig`: a dataclass that transformers accepts wherever it accepts its own.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qhub.errors import ConfigError

if TYPE_CHECKING:
    from qhub.layouts import Layout

__all__ = ["ConfigSpec", "MethodConfig", "method_of"]


def method_of(config: Any) -> str:
    """Return the ``quant_method`` of a config object; transformers' own classes keep it as an enumeration."""
    method = config.quant_method
    return str(getattr(method, "value", method))


@dataclass(frozen=True)
class ConfigSpec:
    """Describes a method's config to the core.

    ``cls``: the config class, or ``"module:Class"`` to import it on first use. ``keys``: what a ``config.json`` may
    hold besides the parameters of ``cls.__init__``. ``check``: called with a config object, raises :class:`ConfigError`
    on values the method does not offer; None accepts all that the class accepts. ``skip``: attribute that lists modules
    to leave in 16 bits; None when the method has none. ``default_skip``: whether the output head and tied weights are
    left alone when that list is not given. ``head``: attribute that, when true, has the output head quantized all the
    same; None when the method has none. ``embeddings``: attribute that, when true, has the input embeddings quantized,
    and with them an output head that is tied to them; None when the method has none. ``untie``: attribute that, when
    true, has such a head keep the dense table, as a weight of its own; None when the method has none.
    ``always_default_skip``: whether they are left alone even when it is given.
    ``offload_skip``: attribute that, when true, leaves modules in 32 bits that ``device_map`` puts on the CPU or the
    disk. ``prefers_accelerator``: whether a model loaded without a ``device_map`` goes to the accelerator, if there is
    one. ``presets``: config values under short names (``{"nf4": {...}}``), the usual one first; what the command line
    and the demo offer. ``companion``: a file that the method's own tools keep the config in; it is written beside
    ``config.json`` and read where that says nothing of quantizing. ``config_key``: a key of ``config.json`` itself
    under which the method's own tools keep the config, instead of ``quantization_config``; both are written. The
    package announces the key, too: an entry point in the group ``qhub.config_keys``, ``key = "method"``, says without
    an import whose it is. ``from_options``: turns command-line options
    (``{"bits": 4}``) into config values; None takes them as keys. ``record``: called before a model is saved, with the
    config, the layouts of quantized matrices by their module's name in the file, and the names of the other linear
    layers and routers; writes into the config what the method's own tools look for there. None: nothing.
    """

    cls: type | str
    keys: frozenset[str] = frozenset()
    check: Callable[[Any], None] | None = None
    skip: str | None = None
    default_skip: bool = True
    always_default_skip: bool = False
    offload_skip: str | None = None
    prefers_accelerator: bool = False
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    head: str | None = None
    embeddings: str | None = None
    untie: str | None = None
    companion: str | None = None
    config_key: str | None = None
    from_options: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    record: Callable[[Any, Mapping[str, Layout], Sequence[str]], None] | None = None

    def resolve(self) -> type:
        """Return the config class."""
        if isinstance(self.cls, type):
            return self.cls
        module, _, name = self.cls.partition(":")
        return getattr(importlib.import_module(module), name)

    def known_keys(self) -> frozenset[str] | None:
        """Return every key that a ``config.json`` of this method may hold; None when the class takes any key."""
        # transformers' classes are dataclasses in name only: their fields are not what their own __init__ takes.
        parameters = inspect.signature(self.resolve().__init__).parameters.values()  # type: ignore[misc]
        own = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        return frozenset(own) | self.keys | {"quant_method"}

    def parse(self, values: dict[str, Any]) -> Any:
        """Return a config object for the plain ``values`` of a ``config.json``.

        Raises :class:`ConfigError` on a key that the method does not know, or a value it does not offer.
        """
        known = self.known_keys()
        unknown = sorted(set(values) - known) if known is not None else []
        cls = self.resolve()
        if unknown:
            raise ConfigError(
                f"quantization_config of method {values.get('quant_method')!r} has unknown keys {unknown}; "
                f"{cls.__name__} knows {sorted(known or ())}: correct the spelling, or update the plugin if the file "
                "is newer"
            )
        try:
            config = cls.from_dict(dict(values))  # type: ignore[attr-defined]
        except ConfigError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"quantization_config {values!r} is not a valid {cls.__name__}: {error}") from error
        self.verify(config)
        return config

    def adopt(self, config: Any) -> Any:
        """Return ``config`` as an object of the method's class, verified.

        transformers hands over its own class where it has one for the name; a method whose class says more parses that.
        """
        if isinstance(config, self.resolve()):
            self.verify(config)
            return config
        adopted = self.parse({key: value for key, value in config.to_dict().items() if value is not None})
        # Plain values leave out data and tokenizers.
        for name, value in vars(config).items():
            if value is not None and getattr(adopted, name, value) is None:
                setattr(adopted, name, value)
        return adopted

    def verify(self, config: Any) -> None:
        """Raise :class:`ConfigError` if ``config`` asks for something that the method does not offer."""
        if self.check is not None:
            self.check(config)


@dataclass
class MethodConfig:
    """Is the base of configs of methods that transformers does not know.

    Subclass it as a dataclass, set ``quant_method`` to the entry point's name and check values in ``__post_init__``
    (raise :class:`ConfigError`)::

        @dataclass
        class MyConfig(MethodConfig):
            quant_method: ClassVar[str] = "mymethod"
            bits: int = 4
    """

    quant_method: ClassVar[str] = ""

    modules_to_not_convert: list[str] | None = field(default=None, kw_only=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a config from plain data; unknown keys raise :class:`ConfigError`."""
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names - {"quant_method"})
        if unknown:
            raise ConfigError(f"{cls.__name__} has no keys {unknown}; it knows {sorted(names)}")
        config = cls(**{name: value for name, value in values.items() if name in names})
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the attributes that exist and return the rest."""
        unused = {}
        for name, value in kwargs.items():
            if name in {f.name for f in dataclasses.fields(self)}:
                setattr(self, name, value)
            else:
                unused[name] = value
        return unused

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data, ``quant_method`` included."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"quant_method": self.quant_method, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, with ``quant_method``."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the config as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def copy(self) -> Self:
        """Return an independent copy."""
        return copy.deepcopy(self)
