"""Many runs, one report: grids of models, corpora and parameters, compared where their manifests allow it."""

from .comparing import compare
from .comparison import Comparison
from .study import Cell, Study, StudyPlan, StudyRun

__all__ = ["Cell", "Comparison", "Study", "StudyPlan", "StudyRun", "compare"]
