"""``hones verify``: a profile tried on its model."""

from __future__ import annotations

from collections.abc import Sequence

from hones_steer.cli.output import command_parser, print_json
from hones_steer.errors import HonesError
from hones_steer.profile import load_profile


def verify(argv: Sequence[str]) -> int:
    """``hones verify FILE MODEL``: load the model, attach the profile, and test that it steers."""
    parser = command_parser(
        "verify",
        "Check that a profile fits a model and steers it: loads the model, attaches the profile and runs\n"
        "the self-test. Exit code 0: yes; 1: no, with the reason; 2: the file or the model cannot be read.",
        "hones verify profiles/vqa.safetensors llava-hf/llava-1.5-7b-hf",
    )
    parser.add_argument("file", metavar="FILE", help="a profile (.safetensors)")
    parser.add_argument("model", metavar="MODEL", help="a model folder or a Hub name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    profile = load_profile(options.file)
    from hones_steer.huggingface import steer
    from hones_steer.loading import load_model

    model = load_model(options.model)
    reason, report = None, None
    try:
        report = steer(model, {profile.task: profile}).verify()
    except HonesError as error:
        reason = str(error)
    if options.json:
        answer = {"file": options.file, "model": options.model, "fits": report is not None, "reason": reason}
        print_json({**answer, "layers_not_run": report.layers_not_run if report is not None else None})
    elif report is None:
        print(f"no: {reason}")
    else:
        print("\n".join(["yes", *(f"  {line}" for line in report.lines())]))
    return 1 if report is None else 0
