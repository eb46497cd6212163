"""All that is decided before a run of the demo. It was chosen on dev scenes, before any test scene was seen."""

from hones_offline.attribution.methods import AttributionOptions
from hones_offline.comparison.settings import CompareSettings
from hones_offline.learning.choosing import FitGrid
from hones_offline.learning.factors import FitSettings

DEFAULT = AttributionOptions().method
"""The selection that `hones attribute` takes unless told otherwise; its profiles are the demo's."""
HEADS = "hones_logprob"
"""The paper's method, with heads scored by the answers' log-probability: by the task's metric takes several times as
long."""
SCENES = {"discovery": 512, "dev": 100, "test": 400}
BATCH = 64
COMPARED = CompareSettings(
    methods=("random", HEADS, DEFAULT),
    main=DEFAULT,
    fractions=(0.02,),
    fraction=0.02,
    seeds=1,
    attribution_examples=128,
    pool=128,
    top_heads=8,
    stages=("masking", "selections"),
    selections=("random", HEADS, DEFAULT),
    comparators=("grid_search",),
    selection_reference=DEFAULT,
    fit=FitSettings(batch_size=16, accumulation_steps=1, clamp=4.0),
    grid=FitGrid(lrs=(0.4,), epochs=3, strengths=(0.5, 1.0)),
    lora_lrs=(0.003,),
)
"""The comparison: banks of 2% (92 neurons), each with factors chosen on dev from one grid, and one factor."""
COMPARED_ON = 128
"""Test scenes on which banks are masked, and on which profiles meet the requests of other tasks."""
