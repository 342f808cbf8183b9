"""What the methods' options do, which of them are refused, and that every script's hyper-parameters are accepted."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from deep_components.arguments import METHOD_OPTIONS, hyper_parameters, recorded_arguments
from deep_components.errors import InputError
from deep_components.loss.selection import SELECTION_OPERATORS
from tests.loss.methods import (
    COMMANDS,
    NUM_GROUPS,
    STAGES,
    WEIGHTS,
    Batch,
    build,
    parse,
    serving_batch,
    set_weights,
    step,
)
from tests.loss.methods import weights_of as weights_in

ROOT = Path(__file__).parents[2]
METHODS = ("arf", "arf_v2", "bce", "fs_lambdaloss", "fs_ranknet", "icc", "lcron", "rankflow", "sorting")
SETTINGS = ("two_stage", "three_stage")
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def lcron(setting: str, *flags: str) -> nn.Module:
    """LCRON in float64 with every weight away from 1."""
    loss = build(setting, "--loss_type=lcron", *flags).double()
    return set_weights(loss, {name: WEIGHTS[name] for name in weights_in(loss)})


def value(loss: nn.Module, batch: Batch) -> float:
    return step(loss, batch).loss.item()


def single_and_end_to_end(setting: str, batch: Batch) -> tuple[dict[str, float], float]:
    """S_i by stage and E, as the loss without options reports them; test_properties holds those to the formulas."""
    terms = step(lcron(setting), batch).terms
    return {stage: terms[stage].item() for stage in STAGES[setting]}, terms["end_to_end"].item()


def same(number: float) -> object:
    return pytest.approx(number, rel=1e-12)


# ---- LCRON's terms and their weights ---------------------------------------------------------------------------------


@each_setting
def test_by_default_the_end_to_end_term_has_weight_one_and_the_logarithm_is_natural(setting: str) -> None:
    batch, loss = serving_batch(setting), lcron(setting)
    single, end_to_end = single_and_end_to_end(setting, batch)
    expected = end_to_end + sum(s / (2 * WEIGHTS[stage] ** 2) + math.log(WEIGHTS[stage]) for stage, s in single.items())
    assert weights_in(loss).keys() == set(STAGES[setting])
    assert value(loss, batch) == same(expected)


@each_setting
def test_terms_end_to_end_is_the_end_to_end_term_alone(setting: str) -> None:
    batch, loss = serving_batch(setting), lcron(setting, "--terms=end_to_end")
    _, end_to_end = single_and_end_to_end(setting, batch)
    assert weights_in(loss) == {}
    assert value(loss, batch) == same(end_to_end)
    assert not set(STAGES[setting]) & step(loss, batch).terms.keys()


@each_setting
def test_terms_single_leaves_out_the_end_to_end_term(setting: str) -> None:
    batch, loss = serving_batch(setting), lcron(setting, "--terms=single")
    single, _ = single_and_end_to_end(setting, batch)
    expected = sum(s / (2 * WEIGHTS[stage] ** 2) + math.log(WEIGHTS[stage]) for stage, s in single.items())
    assert weights_in(loss).keys() == set(STAGES[setting])
    assert value(loss, batch) == same(expected)
    assert "end_to_end" not in step(loss, batch).terms


@each_setting
@pytest.mark.parametrize("weight", [0.01, 0.1, 0.5, 1, 2, 3, 4, 5])
def test_single_weight_fixes_the_weight_of_the_single_stage_terms(setting: str, weight: float) -> None:
    batch, loss = serving_batch(setting), lcron(setting, f"--single_weight={weight}")
    single, end_to_end = single_and_end_to_end(setting, batch)
    assert weights_in(loss) == {}
    assert value(loss, batch) == same(end_to_end + weight * sum(single.values()))


@each_setting
def test_weighting_paper_is_equation_13(setting: str) -> None:
    batch, loss = serving_batch(setting), lcron(setting, "--weighting=paper")
    single, end_to_end = single_and_end_to_end(setting, batch)
    weights = weights_in(loss)
    assert weights.keys() == {"end_to_end", *STAGES[setting]}
    alpha = weights["end_to_end"]
    expected = end_to_end / (2 * alpha**2) + math.log2(math.prod(weights.values()))
    expected += sum(s / (2 * weights[stage] ** 2) for stage, s in single.items())
    result = step(loss, batch)
    assert result.loss.item() == same(expected)
    slope = -end_to_end / alpha**3 + 1 / (alpha * math.log(2))
    assert result.weight_grads["end_to_end"].item() == same(slope)


# ---- defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "default"), [("two_stage", "shared"), ("three_stage", "repeated")])
def test_ties_are_repeated_by_default_in_three_stages_only(setting: str, default: str) -> None:
    batch = serving_batch(setting)
    assert value(lcron(setting), batch) == value(lcron(setting, f"--label_ties={default}"), batch)
    other = {"shared": "repeated", "repeated": "shared"}[default]
    assert value(lcron(setting), batch) != value(lcron(setting, f"--label_ties={other}"), batch)


@each_setting
@pytest.mark.parametrize(("name", "tau"), [("arf", 200.0), ("arf_v2", 200.0), ("lcron", 50.0), ("sorting", 50.0)])
def test_default_temperatures(setting: str, name: str, tau: float) -> None:
    batch = serving_batch(setting)
    default, given, other = (
        value(build(setting, f"--loss_type={name}", *flags), batch)
        for flags in ((), (f"--tau={tau}",), (f"--tau={tau / 2}",))
    )
    assert default == given != other


# ---- what a run records ----------------------------------------------------------------------------------------------


@each_setting
@pytest.mark.parametrize("name", METHODS)
def test_building_a_loss_leaves_the_arguments_alone(setting: str, name: str) -> None:
    args = parse(setting, f"--loss_type={name}")
    before = dict(vars(args))
    COMMANDS[setting].build_loss(args)
    assert vars(args) == before


def test_hyper_parameters_are_what_the_method_was_built_with() -> None:
    assert hyper_parameters(build("three_stage", "--loss_type=lcron", "--tau=2", "--end_to_end_quotas=4,3,2")) == {
        "tau": 2.0, "topk_op": "neural_sort", "terms": "both", "single_weight": None, "weighting": "original",
        "label_ties": "repeated", "end_to_end_quotas": {"retrieval": 4, "prerank": 3, "rank": 2}, "num_relevant": 10,
    }  # fmt: skip
    quotas = hyper_parameters(build("two_stage", "--loss_type=lcron", "--single_quotas=4,3"))["single_quotas"]
    assert quotas == {"retrieval": 4, "rank": 3}
    assert hyper_parameters(build("two_stage", "--loss_type=icc"))["weights"] == {"retrieval": 1, "rank": 1}
    assert list(hyper_parameters(build("three_stage", "--loss_type=icc"))["weights"].values()) == [1, 2, 4]
    assert not hyper_parameters(build("two_stage", "--loss_type=rankflow"))["order_distillation"]


@each_setting
@pytest.mark.parametrize("name", METHODS)
def test_recorded_arguments_are_those_given_and_the_defaults_of_the_method(setting: str, name: str) -> None:
    args = parse(setting, f"--loss_type={name}")
    recorded = recorded_arguments(args, build(setting, f"--loss_type={name}"))
    chosen = {option for option, value in recorded.items() if value is not None and vars(args)[option] is None}
    assert chosen & set(METHOD_OPTIONS) == set(TAKES[name]) - {"single_weight", "end_to_end_quotas", "single_quotas"}
    json.dumps({option: recorded[option] for option in METHOD_OPTIONS})


def test_recorded_arguments_keep_what_was_given() -> None:
    flags = ("--loss_type=lcron", "--tau=2", "--end_to_end_quotas=4,3")
    recorded = recorded_arguments(parse("two_stage", *flags), build("two_stage", *flags))
    assert (recorded["tau"], recorded["end_to_end_quotas"]) == (2, [4, 3])


# ---- what is refused -------------------------------------------------------------------------------------------------

TAKES = {
    "bce": (),
    "icc": (),
    "rankflow": (),
    "fs_ranknet": (),
    "fs_lambdaloss": (),
    "arf": ("tau",),
    "arf_v2": ("tau", "topk_op"),
    "lcron": (
        *("tau", "topk_op", "terms", "single_weight", "weighting", "label_ties"),
        *("end_to_end_quotas", "single_quotas"),
    ),
    "sorting": ("tau", "topk_op"),
}
GIVEN = {
    "tau": "50",
    "topk_op": "neural_sort",
    "terms": "both",
    "single_weight": "1",
    "weighting": "original",
    "label_ties": "shared",
    "end_to_end_quotas": "30,20",
    "single_quotas": "30,20",
}


def refusal(setting: str, *flags: str) -> str:
    with pytest.raises(InputError) as error:
        build(setting, *flags)
    return str(error.value)


@each_setting
@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in TAKES for option in GIVEN if option not in TAKES[name]]
)
def test_an_option_the_method_does_not_take(setting: str, name: str, option: str) -> None:
    message = refusal(setting, f"--loss_type={name}", f"--{option}={GIVEN[option]}")
    assert f"--{option}" in message
    assert name in message
    for taken in TAKES[name] or ("none",):
        assert taken in message


@each_setting
@pytest.mark.parametrize("name", ["lcorn", "LCRON", "", "run_train2"])
def test_an_unknown_method_lists_the_methods(setting: str, name: str) -> None:
    message = refusal(setting, f"--loss_type={name}")
    assert f"--loss_type={name}" in message
    assert message.endswith("choose one of: " + ", ".join(METHODS))


@each_setting
@pytest.mark.parametrize("other", ["--terms=single", "--terms=end_to_end", "--weighting=paper"])
def test_single_weight_contradicts_other_options(setting: str, other: str) -> None:
    message = refusal(setting, "--loss_type=lcron", "--single_weight=2", other)
    assert "--single_weight" in message
    assert "--terms=both" in message
    assert "--weighting=original" in message


QUOTAS_AND_WITHOUT = [("--end_to_end_quotas", "--terms=single"), ("--single_quotas", "--terms=end_to_end")]


@each_setting
@pytest.mark.parametrize(("option", "without"), QUOTAS_AND_WITHOUT)
def test_quotas_without_their_term(setting: str, option: str, without: str) -> None:
    quotas = ",".join(["10"] * len(STAGES[setting]))
    message = refusal(setting, "--loss_type=lcron", without, f"{option}={quotas}")
    assert option in message
    assert without in message


@each_setting
@pytest.mark.parametrize("option", ["--end_to_end_quotas", "--single_quotas"])
@pytest.mark.parametrize("wrong", ["too few", "too many", "beyond the items"])
def test_quotas_that_do_not_fit_the_cascade(setting: str, wrong: str, option: str) -> None:
    stages, items = STAGES[setting], 10 * NUM_GROUPS[setting]
    quotas = {
        "too few": [10] * (len(stages) - 1),
        "too many": [10] * (len(stages) + 1),
        "beyond the items": [items + 1] * len(stages),
    }[wrong]
    flag = f"{option}=" + ",".join(map(str, quotas))
    message = refusal(setting, "--loss_type=lcron", flag)
    assert flag in message
    assert f"from 1 to {items}" in message
    assert ", ".join(stages) in message


@each_setting
@pytest.mark.parametrize(
    "flag",
    [
        *("--tau=0", "--tau=-1", "--tau=nan", "--tau=inf", "--tau=x", "--sort=quick_sort", "--terms=none"),
        *("--single_weight=-1", "--single_weight=nan", "--weighting=uniform", "--label_ties=broken"),
        *("--end_to_end_quotas=", "--end_to_end_quotas=30,", "--end_to_end_quotas=30,x", "--end_to_end_quotas=0,20"),
        "--single_quotas=0,20",
    ],
)
def test_a_value_out_of_range_is_refused_at_the_command_line(
    setting: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        build(setting, "--loss_type=lcron", flag)
    assert exit_code.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err


# ---- the scripts -----------------------------------------------------------------------------------------------------

SCRIPTS = [
    script
    for setting in SETTINGS
    for script in sorted((ROOT / setting).glob("*.sh"))
    if script.name not in ("run.sh", "all.sh")
]


def script_arguments(script: Path) -> tuple[str, list[str]]:
    """NAME and the hyper-parameters of a script: what stands between NAME and ``--``."""
    command = re.search(r'run\.sh" (.*?) -- "\$@"', script.read_text().replace("\\\n", " "), flags=re.DOTALL)
    assert command, f'{script}: not of the form: exec bash run.sh NAME ... -- "$@"'
    name, *arguments = shlex.split(command[1])
    return name, arguments


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.stem}")
def test_a_script_parses_builds_and_trains(script: Path) -> None:
    setting = script.parent.name
    name, arguments = script_arguments(script)
    assert name == script.stem
    assert all(argument.startswith("--") and "=" in argument for argument in arguments)
    args = COMMANDS[setting].parse_args([*arguments, "--data_dir=D", "--output_dir=O"])
    assert (args.lr, args.batch_size) == (0.01, 1024)  # spec, section 5
    assert step(build(setting, *arguments), serving_batch(setting, dtype=torch.float32)).loss.isfinite()


@each_setting
def test_every_method_of_the_main_table_has_a_script_of_its_name(setting: str) -> None:
    methods = {script.stem: script_arguments(script)[1] for script in SCRIPTS if script.parent.name == setting}
    for name in set(METHODS) - {"sorting"}:
        assert f"--loss_type={name}" in methods[name]


def test_the_variants_of_the_paper_have_scripts() -> None:
    """Tables 3, 4, 7, 8, appendix E.1 and Eq. 13, as the specification's section 4 lists them."""
    losses = {script.stem: set(script_arguments(script)[1]) for script in SCRIPTS if script.parent.name == "two_stage"}
    wanted = [{"--terms=single"}, {"--terms=end_to_end"}, {"--topk_op=soft_sort", "--loss_type=lcron"}]
    wanted += [{"--loss_type=sorting", "--topk_op=neural_sort"}, {"--loss_type=sorting", "--topk_op=soft_sort"}]
    wanted += [{"--end_to_end_quotas=30,20"}, {"--weighting=paper"}]
    wanted += [{f"--single_weight={c}"} for c in ("0.01", "0.1", "0.5", "1", "2", "3", "4", "5")]
    wanted += [{"--loss_type=lcron", f"--tau={tau}"} for tau in (1, 20, 50, 100, 200, 1000)]
    for flags in wanted:
        assert any(flags <= given for given in losses.values()), flags


def test_sorting_wants_an_operator_that_gives_a_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SELECTION_OPERATORS, "gate", SELECTION_OPERATORS["soft_sort"])
    with pytest.raises(InputError, match="--topk_op=gate: sorting takes one of neural_sort, soft_sort"):
        build("two_stage", "--loss_type=sorting", "--sort=gate")
