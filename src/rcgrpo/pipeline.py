"""Where the pipelines with a region are found; each stands in its editor's file."""

from .editors.flux_kontext import RegionDecoupledFluxKontextPipeline
from .editors.opening import RegionDecoupledPipeline
from .editors.region_decoupled import RegionDecoupledPipelineOutput

__all__ = ["RegionDecoupledFluxKontextPipeline", "RegionDecoupledPipeline", "RegionDecoupledPipelineOutput"]
