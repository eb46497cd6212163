"""Text and image-text models of transformers: each has a layout or a LayoutError that says why not."""

import warnings

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hones_steer.errors import LayoutError
from hones_steer.profile import ModelIdentity

pytestmark = pytest.mark.matrix

MODELS = sorted(
    {
        (model_type, names if isinstance(names, str) else names[0])
        for mapping in (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        )
        for model_type, names in mapping.items()
    }
)


INCOMPLETE = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)


def on_meta(model_type, name):
    """A model of the default configuration on the meta device; skips the test if the defaults make no model."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return getattr(transformers, name)(CONFIG_MAPPING[model_type]())
    except (*INCOMPLETE, StrictDataclassError) as error:
        pytest.skip(f"transformers cannot build it from its default configuration: {type(error).__name__}: {error}")


@pytest.mark.parametrize(("model_type", "name"), MODELS)
def test_it_is_identified_or_refused(model_type, name):
    model = on_meta(model_type, name)
    try:
        identity = ModelIdentity.from_model(model)
    except LayoutError:
        return
    assert identity.num_layers > 1
    assert all(run.dense > identity.hidden_size / 2 for run in identity.runs)


def test_most_can_be_built():
    """If few could be built, the test above would test nothing."""
    sample = MODELS[::10]
    built = [(model_type, name) for model_type, name in sample if buildable(model_type, name)]
    assert len(built) > 0.7 * len(sample)


def buildable(model_type, name):
    try:
        on_meta(model_type, name)
    except pytest.skip.Exception:
        return False
    return True
