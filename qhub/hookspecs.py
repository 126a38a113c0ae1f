"""The hook spec of qhub: everything a plugin can do, and its manual.

A plugin is a module (or class, or instance) with functions named as below and marked with :data:`hookimpl`, announced
by an entry point in the group ``qhub.plugins`` whose NAME is the ``quant_method`` in ``config.json``::

    # pyproject.toml
    [project.entry-points."qhub.plugins"]
    mymethod = "qhub_mymethod"

    # qhub_mymethod/__init__.py
    from qhub import hookimpl

    @hookimpl
    def qhub_config(): ...

Packages that only bring kernels use the group ``qhub.kernels``; there the entry point's name is free.

Two kinds of calls. *Addressed*: "quantize this layer with mymethod" calls the plugin of that name and no other.
*Broadcast*: "which kernels exist?" calls every plugin, one after the other; one that raises is recorded, named in a
warning and left out. No hook is called inside ``forward``. A function may take fewer arguments than the spec, so the
spec can grow; a misspelled hook is refused when the plugin is loaded. The entry module must be light: torch is allowed,
a native library is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from qhub.calibration import CalibrationOptions
    from qhub.config import ConfigSpec
    from qhub.formats import Container, Format
    from qhub.kernels import KernelSpec
    from qhub.layouts import Layout
    from qhub.merging import AdapterPolicy
    from qhub.plan import Adoption, LayerPlan, Skip, WeightInfo
    from qhub.reports import Finding

__all__ = ["QuantizerPlugin", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("qhub")
hookimpl = pluggy.HookimplMarker("qhub")


class QuantizerPlugin:
    """Lists every hook; none is compulsory but ``qhub_config``, ``qhub_plan`` and ``qhub_format`` for a method."""

    # -- the five aspects of a method: addressed ---------------------------------------------------------------------

    @hookspec(firstresult=True)
    def qhub_config(self) -> ConfigSpec:  # type: ignore[empty-body]
        """Describe the method's config class, its keys and its skip list.

        Called: addressed, once, when the method's name is first used. Returns a :class:`qhub.config.ConfigSpec`. Use
        transformers' own class where one exists (``ConfigSpec(cls="transformers:GPTQConfig")``), so that users' code
        stays.
        """

    @hookspec(firstresult=True)
    def qhub_plan(  # type: ignore[empty-body]
        self, config: Any, weights: Sequence[WeightInfo], model_config: Any
    ) -> Mapping[str, LayerPlan | Skip]:
        """Choose a layout for each weight, from names and shapes alone.

        Called: addressed, on the meta device, before any weight is read; again when a checkpoint of the method is
        loaded, then only with the weights that the checkpoint stores quantized. Modules that the user excluded are
        already left out. ``model_config``: transformers' config of the model, for methods whose choice depends on the
        architecture; None where there is no model. Returns ``{weight.name: LayerPlan or Skip(reason)}``; a weight that
        is not in it is skipped without a reason, which is reported as such. Raise
        :class:`qhub.errors.ConfigError` for what cannot be (a group size that does not divide K): better here than
        after minutes of quantizing.
        """

    @hookspec(firstresult=True)
    def qhub_quantize(  # type: ignore[empty-body]
        self,
        config: Any,
        weight: Tensor,
        layout: Layout,
        statistics: Mapping[str, Tensor],
        parameter: str,
        expert: int | None,
    ) -> Mapping[str, Tensor]:
        """Turn one dense weight into the tensors of its layout.

        Called: addressed, once per matrix (fused experts one at a time), on the weight's device, without gradients.
        ``weight``: (layout.out_features, layout.in_features), in the dtype it was loaded in; do not write into it.
        ``statistics``: those that the plan asked for, by name (:mod:`qhub.calibration.statistics` defines each), for
        the input of this very layer; empty otherwise. ``parameter``: its name, ``expert``: which of its matrices; empty
        and None where several layers are quantized as one. Returns ``{part name: tensor}``, exactly the layout's
        parts. A plan that says ``rows_independent`` gets the layers that share an input and a layout as one tall
        matrix. A method that only loads checkpoints leaves this hook out; asking it to quantize is then refused.
        """

    @hookspec(firstresult=True)
    def qhub_calibration(self, config: Any) -> CalibrationOptions:  # type: ignore[empty-body]
        """Say what ``config`` asks of the calibration engine: data, samples, order.

        Called: addressed, before a model is calibrated, for methods whose plans ask for statistics. Returns
        :class:`qhub.calibration.CalibrationOptions`; what the caller gives (``qhub quantize --dataset``) wins over it.
        None: no data is needed for these settings. No such hook: the engine's defaults.
        """

    @hookspec(firstresult=True)
    def qhub_equalize(
        self,
        config: Any,
        weights: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        statistics: Mapping[str, Tensor],
        tied: Tensor | None,
    ) -> Tensor | None:
        """Choose input scales for layers that read the same input, before any of them is quantized.

        Called: addressed, for methods that calibrate, once per group of layers with a common input. ``weights``: by
        name, each (N_i, K), still dense; ``layouts``: of those that will be quantized (others only share the input);
        ``statistics``: of that input, as the plans ask. ``tied``: (K,) int64 where features with equal numbers must get
        equal scales, because one number of the preceding operation stands for all of them (query heads that share a
        value head); None: all are free. Returns s, (K,) float32, finite and above zero: the weights' columns are
        multiplied by it and the input is divided by it, in the preceding operation where that is possible, else by the
        layout's input scale. None: leave this group as it is.
        """

    @hookspec(firstresult=True)
    def qhub_format(self, config: Any) -> Format:  # type: ignore[empty-body]
        """Return the checkpoint format that ``config`` names: tensors to and from file entries.

        Called: addressed, once per load or save. Returns a :class:`qhub.formats.Format`: pure functions on dicts.
        Written files must be ones that the method's own library reads.
        """

    @hookspec(firstresult=True)
    def qhub_container(self, config: Any, file: Path) -> Container:  # type: ignore[empty-body]
        """Open ``file``, a checkpoint of the method that is not safetensors.

        Called: addressed, by ``from_pretrained(..., gguf_file=...)`` and for folders that name such a file. Reads and
        checks the header only; a file that promises more than it holds is refused before anything is allocated.
        Methods whose checkpoints are safetensors leave the hook out.
        """

    @hookspec(firstresult=True)
    def qhub_save(  # type: ignore[empty-body]
        self, config: Any, model: Any, folder: Path, container: Container | None, max_shard_size: int | str
    ) -> Sequence[Path]:
        """Write the weights of ``model`` into ``folder`` and return the files: for methods with a container.

        Called: addressed, by ``save_pretrained``, which writes ``config.json`` afterwards and moves the files to their
        place. ``container``: what the model was loaded from, None if it was quantized; tensors that have not changed
        are written as they lie there.
        """

    @hookspec(firstresult=True)
    def qhub_adopt(  # type: ignore[empty-body]
        self, layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any], model_config: Any
    ) -> Adoption:
        """Choose a config and layouts of this method for numbers that another method chose.

        Called: addressed, by ``qhub convert`` and ``qhub quantize --format``. ``layouts``: by weight, of one matrix,
        as the source holds them, layouts of blocks already told in the core's words (:meth:`Layout.plain`);
        ``others``: weights of linear layers that stay as they are; ``options``: config values that the user asked for;
        ``model_config``: transformers' config of the model. Returns an :class:`qhub.plan.Adoption` whose layouts are
        the nearest that the method's files can hold: the same grid or a finer one, the same width of codes or a wider
        one. Whether the numbers fit exactly is not decided here: the core tries and compares. A method whose
        checkpoints cannot hold other methods' numbers leaves the hook out.
        """

    @hookspec(firstresult=True)
    def qhub_adapter(self, config: Any, layout: Layout) -> AdapterPolicy:  # type: ignore[empty-body]
        """Say how an update (a merged adapter, ``weight.copy_``) goes back onto the layout, or why it cannot.

        Called: addressed, once per weight, when the model is built. Returns a :class:`qhub.merging.AdapterPolicy`.
        None, or no such hook: the layout picks what is nearer, its own grid kept or refitted.
        """

    # -- kernels: broadcast ------------------------------------------------------------------------------------------

    @hookspec
    def qhub_kernels(self) -> Iterable[KernelSpec]:  # type: ignore[empty-body]
        """Offer kernels, declared as data; their code is imported on first use.

        Called: broadcast, once per process, when the first layer looks for a kernel. Returns
        :class:`qhub.kernels.KernelSpec` objects. None or an empty list: none on this machine. Do not import a native
        library to answer.
        """

    @hookspec
    def qhub_decoding(self, device: str) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Offer fused operations of a decode step on devices of the type ``device``.

        Called: broadcast, once per process and device type, when a model's first decode step is set up. Returns
        ``{operation: "module:function"}`` for operations of :mod:`qhub.decoding.operations`, whose functions are the
        contracts; they are compared with the model's own code before they are used. None: none for this device.
        """

    @hookspec
    def qhub_experts(self, device: str) -> str | None:  # type: ignore[empty-body]
        """Offer a forward for fused experts whose weights are quantized, on devices of the type ``device``.

        Called: broadcast, once per process and device type, when a model with such experts is loaded or optimized.
        Returns ``"module:function"`` of an experts implementation of transformers (called with the module, the hidden
        states, the chosen experts and their weights). It must run the module's own loop where it cannot do better.
        None: none for this device.
        """

    # -- tooling: broadcast ------------------------------------------------------------------------------------------

    @hookspec
    def qhub_doctor(self) -> Iterable[Finding]:  # type: ignore[empty-body]
        """Say what works here, and what to install or change for more.

        Called: broadcast, by ``qhub doctor``. Returns :class:`qhub.reports.Finding` objects; None when there is nothing
        to say. May probe with ``importlib.util.find_spec``; should answer within a second.
        """

    @hookspec
    def qhub_commands(self, app: Any) -> None:
        """Add commands to the ``qhub`` command line.

        Called: broadcast, when the commands are listed or one is asked for that is not built in; ``app``: a
        :class:`typer.Typer` of the plugin's own. Returns nothing. A plugin whose entry module does not mention this
        hook by name is not imported for it. A name that is taken is left out, with a warning.
        """
