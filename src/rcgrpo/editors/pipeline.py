"""Where the pipelines with a region are found; each stands in its editor's file."""

from .flux_kontext import RegionDecoupledFluxKontextPipeline
from .opening import RegionDecoupledPipeline
from .region_decoupled import RegionDecoupledPipelineOutput

__all__ = ["RegionDecoupledFluxKontextPipeline", "RegionDecoupledPipeline", "RegionDecoupledPipelineOutput"]
