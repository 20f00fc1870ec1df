"""Whatever stands in a line, a settings file, a sweep or a DeepSpeed file: it is taken and means one thing, or is refused in a line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from fuzzed import WORDS, as_json, damaged, fuzzed, mutated, near, outcome, scalars, tree, values, words
from hypothesis import example, given
from hypothesis import strategies as st
from test_ds_config import PUBLIC

from megalens.config import Config, Schedule, config_from_dict, config_to_dict, config_to_yaml, load_config, validate
from megalens.config.reading import kind_of, known_keys
from megalens.engine import ds_config
from megalens.schedule import Clock, duration_steps, lr_factor, parse_duration, schedule_value
from megalens.sweep.file import read_sweep

ROOT = Path(__file__).resolve().parents[1]
KEYS = known_keys()
SECTIONS = [key for key in known_keys(sections=True) if key not in KEYS]
keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from([*SECTIONS, "terms.x", "terms.x.type", "terms.", "terms", "lr", "config", "defaults", "mse_weight.end_value"]),
    st.sampled_from(KEYS).flatmap(lambda key: st.sampled_from([key.upper(), key[:-1], f"{key}.x", f".{key}", key.replace(".", "..")])),
    words,
)
DEFAULTS = {key: value for key, value in config_to_dict(Config()).items() if not isinstance(value, dict)}
settings_values = st.one_of(values, st.sampled_from(list(DEFAULTS.values())), st.sampled_from(list(DEFAULTS.values())).flatmap(near))
units = st.sampled_from(["s", "os", "e", "steps", "epochs", "", " s", "S", "h"])
durations = st.one_of(
    words,
    st.builds(lambda number, unit: f"{number}{unit}", st.one_of(st.integers(), st.floats(), st.sampled_from(WORDS)), units),
    st.floats(),
    st.integers(),
)
clocks = st.builds(Clock, st.integers(1, 10**9), st.integers(1, 4096), st.integers(0, 10**12))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


def means_one_thing(config: Config, place: Path) -> None:
    """The configuration is the same when it is written and read back, as a run's file and as a checkpoint's."""
    saved = config_to_dict(config)
    assert config_to_dict(config_from_dict(json.loads(json.dumps(saved)))) == saved
    (place / "again.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert config_to_dict(load_config([f"config={place / 'again.yaml'}"])) == saved | {"run_name": config.run_name or "again"}


@fuzzed(80)
@given(st.lists(st.one_of(st.builds(lambda key, value: f"{key}={value}", keys, st.one_of(words, values)), words), max_size=4))
@example(["run_name=\\${seed}"])
def test_a_command_line_is_taken_or_refused(place, arguments):
    arguments = [argument for argument in arguments if not argument.removeprefix("--").startswith("config=")]
    config, refused = outcome(lambda: load_config(arguments))
    if refused is None:
        means_one_thing(config, place)


def nested(pairs: list[tuple[str, object]]) -> dict:
    """Dotted keys as sections, where nothing is in the way."""
    result: dict = {}
    for key, value in pairs:
        *sections, last = key.split(".")
        section = result
        for name in sections:
            section = section.setdefault(name, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[last] = value
    return result


@st.composite
def files_of_settings(draw) -> bytes:
    pairs = draw(st.lists(st.tuples(keys, settings_values), max_size=4))
    form = draw(st.sampled_from(["sections", "dotted", "written", "written", "damaged", "bytes"]))
    if form == "written":
        return "\n".join(f"{key}: {draw(st.one_of(words, scalars))}" for key, _ in pairs).encode(errors="surrogatepass")
    if form == "bytes":
        return draw(st.binary(max_size=60))
    text = yaml.safe_dump(nested(pairs) if form == "sections" else dict(pairs), allow_unicode=draw(st.booleans()))
    data = text.encode(errors="surrogatepass")
    return draw(damaged(data)) if form == "damaged" else data


@fuzzed(80)
@given(files_of_settings())
@example(b'seed: "\\U110B9F7B"')
@example(b"dataset: 1e-05\ndataset.split_seed: true")
@example(b"dataset.name.x: 1\ndataset.name: a")
def test_a_settings_file_is_taken_or_refused_with_its_name(place, data):
    path = place / "mine.yaml"
    path.write_bytes(data)
    before = tree(place, but=("again.yaml",))
    config, refused = outcome(lambda: load_config([f"config={path}"]))
    if refused is None:
        means_one_thing(config, place)
    assert tree(place, but=("again.yaml",)) == before


@fuzzed(150)
@given(durations, clocks)
def test_a_duration_that_is_taken_is_a_number_of_steps(text, clock):
    try:
        parse_duration(text)
    except ValueError as error:
        assert "is no duration" in str(error) or "only epochs may be fractional" in str(error)
        return
    assert 0 <= duration_steps(text, clock) < 10**45


@fuzzed(80)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["constant", "linear", "cosine", "exponential", "step", "x"]),
            **dict.fromkeys(("value", "start_value", "end_value"), st.one_of(st.floats(), st.floats(0, 10), scalars)),
            **dict.fromkeys(("constant_steps_before_decay", "num_steps"), durations),
        },
    ),
    clocks,
    st.lists(st.integers(0, 10**12), min_size=1, max_size=4),
    st.sampled_from(["gumbel_tau_schedule", "mse_weight", "entropy_weight", "terms.x", "lr_multipliers.verbalizer.prompt"]),
)
@example({"start_value": 2**63}, Clock(1, 1, 1), [0, 1], "gumbel_tau_schedule")
@example({"type": "exponential", "start_value": 1e-300, "end_value": 1e150}, Clock(1, 1, 9), [4], "mse_weight")
def test_a_schedule_that_is_taken_lies_between_its_ends(said, clock, steps, key):
    config, refused = outcome(lambda: config_from_dict({"mse_weight": 1.0, **nested([(key, said)])}))
    if refused is not None:
        return
    schedule = config
    for part in key.split("."):
        schedule = schedule[part] if isinstance(schedule, dict) else getattr(schedule, part)
    assert isinstance(schedule, Schedule)
    low, high = min(schedule.ends), max(schedule.ends)
    for step in steps:
        value = schedule_value(schedule, step, clock)
        assert math.isfinite(value)
        assert low - 1e-9 * abs(low) <= value <= high + 1e-9 * abs(high)


@fuzzed(60)
@given(
    st.dictionaries(st.sampled_from(["type", "warmup_steps", "warmup_start_factor", "end_factor"]), settings_values),
    clocks,
    st.integers(0, 10**9),
)
def test_a_learning_rate_is_finite(said, clock, step):
    config, refused = outcome(lambda: config_from_dict({"lr_scheduler": said}))
    if refused is None:
        assert math.isfinite(lr_factor(config.lr_scheduler, step, clock))


# ------------------------------------------------------------------------------------------------------------ DeepSpeed

DS_FILES = [PUBLIC, *(json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json")))]
DS_FILES += [json.loads(path.read_bytes().decode("utf-8-sig")) for path in sorted((ROOT / "tests" / "cases" / "deepspeed").glob("*.json"))]
ds_files = st.one_of(
    st.sampled_from(DS_FILES).flatmap(mutated).map(as_json),
    st.sampled_from(DS_FILES).map(as_json).flatmap(damaged),
    values.map(as_json),
    st.dictionaries(st.sampled_from(sorted({key for file in DS_FILES if isinstance(file, dict) for key in file})), values).map(as_json),
    st.binary(max_size=40),
)


@fuzzed(80)
@given(ds_files, st.sampled_from([1, 2, 3]), st.sampled_from(["fp32", "bf16"]))
def test_a_deepspeed_file_is_made_whole_or_refused(place, data, ranks, dtype):
    path = place / "ds.json"
    path.write_bytes(data)
    config = Config(deepspeed=str(path), batch_size=12, dtype=dtype, device="cpu")
    resolved, refused = outcome(lambda: ds_config.resolve(config, ranks))
    if refused is None:
        assert '"auto"' not in json.dumps(resolved)
        assert resolved["train_batch_size"] == 12
        assert outcome(lambda: ds_config.zero_stage(config)) == (resolved.get("zero_optimization", {}).get("stage", 0), None)
    else:
        assert all(str(path) in line for line in refused.split("\n"))
    assert path.read_bytes() == data


# --------------------------------------------------------------------------------------------------------------- sweeps

SWEEPS = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "tests" / "cases" / "sweeps").glob("*.yaml"))]
SWEEPS += [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "sweeps").glob("*.yaml"))]
parameters = st.dictionaries(
    keys,
    st.one_of(
        st.fixed_dictionaries({"value": settings_values}),
        st.fixed_dictionaries({"values": st.one_of(st.lists(settings_values, max_size=3), values)}),
        st.fixed_dictionaries(
            {"min": scalars, "max": scalars},
            optional={
                "distribution": st.sampled_from(["uniform", "int_uniform", "q_uniform", "log_uniform", "log_uniform_values", "normal"]),
                "q": scalars,
            },
        ),
        values,
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def sweep_files(draw) -> bytes:
    sweep = draw(st.sampled_from(SWEEPS))
    form = draw(st.sampled_from(["mutated", "mutated", "parameters", "parameters", "damaged", "bytes"]))
    if form == "bytes":
        return draw(st.binary(max_size=60))
    if form == "parameters":
        sweep = sweep | {"parameters": draw(parameters), "method": draw(st.sampled_from(["grid", "random", "bayes"]))}
    if form == "mutated":
        sweep = draw(mutated(sweep))
    data = yaml.safe_dump(sweep, allow_unicode=True).encode(errors="surrogatepass")
    return draw(damaged(data)) if form == "damaged" else data


@fuzzed(60)
@given(sweep_files())
@example(yaml.safe_dump({**SWEEPS[0], "command": None, "parameters": {"config": {"value": "9" * 400}}}).encode())
def test_a_sweep_file_is_taken_with_every_trial_or_refused_with_its_name(place, data):
    path = place / "sweep.yaml"
    path.write_bytes(data)
    sweep, refused = outcome(lambda: read_sweep(path))
    if refused is not None:
        assert str(path) in refused
    else:
        points = [point for _, point in zip(range(3), sweep.grid(), strict=False)]
        drawn = {key: numbers.samples()[1] for key, numbers in sweep.ranges.items()}
        for point in points:
            validate(sweep.config({**point, **drawn}))
        assert all(kind_of(key) is not None for key in sweep.searched)
    assert path.read_bytes() == data
