"""The LoRA beside the base: loaded when it is asked for, and again when a run in progress has written a newer one."""

from ..editors import RegionDecoupledFluxKontextPipeline
from ..evaluation.benchmark import Contender, contenders, load_loras


class LoraSlot:
    """The one LoRA that is loaded into a pipeline, changed when another is asked for or its file has changed."""

    def __init__(self, pipeline: RegionDecoupledFluxKontextPipeline) -> None:
        self.pipeline = pipeline
        self._loaded: list[tuple[Contender, int]] = []

    def entrants(self, lora: str) -> list[Contender]:
        """The base and, unless `lora` is empty, that LoRA: a folder, a file or a Hub id.

        Raises:
            ValueError: it cannot be found, or does not fit the model.
        """
        found = contenders([lora.strip()] if lora.strip() else [])
        wanted = [(contender, contender.lora.stat().st_mtime_ns) for contender in found if contender.lora is not None]
        if wanted != self._loaded:
            self._clear()
            load_loras(self.pipeline, found)
            self._loaded = wanted
        return found

    def _clear(self) -> None:
        self._loaded = []
        self.pipeline.unload_lora_weights()
