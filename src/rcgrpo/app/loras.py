"""LoRAs beside the base: loaded when they are asked for, and again when a run in progress has written a newer one."""

from ..editors import RegionDecoupledFluxKontextPipeline
from ..evaluation.benchmark import Contender, contenders, load_loras


class LoraSlot:
    """The LoRAs that are loaded into a pipeline, changed when others are asked for or a file has changed."""

    def __init__(self, pipeline: RegionDecoupledFluxKontextPipeline) -> None:
        self.pipeline = pipeline
        self._loaded: list[tuple[Contender, int]] = []

    def entrants(self, *loras: str) -> list[Contender]:
        """The base and these LoRAs, folders, files or Hub ids, but for empty ones.

        Raises:
            ValueError: one cannot be found, or does not fit the model.
        """
        found = contenders([lora.strip() for lora in loras if lora.strip()])
        wanted = [(contender, contender.lora.stat().st_mtime_ns) for contender in found if contender.lora is not None]
        if wanted != self._loaded:
            self._clear()
            load_loras(self.pipeline, found)
            self._loaded = wanted
        return found

    def _clear(self) -> None:
        self._loaded = []
        self.pipeline.unload_lora_weights()
