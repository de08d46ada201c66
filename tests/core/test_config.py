"""Config files are found by path and by name; overrides set what exists and nothing else."""

import pytest

import hydrax
from configs import common
from hydrax.core.build import ConfigError, Raw, build
from hydrax.core.config import known, load_config
from hydrax.train.config import RunConfig


def write(folder, text):
    path = folder / "my.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.py", "configs/quickstart.py"])
def test_names_and_paths_find_the_same_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # shipped configs are found from anywhere
    assert load_config(name).to_dict() == load_config("configs/quickstart.py").to_dict()


def test_a_file_of_the_user_is_found_by_its_path(tmp_path):
    path = write(tmp_path, "from configs import common\ndef get_config(arg=''):\n    return common.base()\n")
    assert load_config(path).to_dict() == common.base().to_dict()


def test_text_after_the_colon_is_the_argument():
    small, large = load_config("lm:100m"), load_config("lm:340m,ratio=7")
    assert (small.model.d_model, large.model.d_model) == (768, 1024)
    assert large.model.pattern == "every(7, gdn, attn)"


@pytest.mark.parametrize("name", [n for n in known() if n.count("/") == 0])
def test_every_shipped_config_builds(name):
    cfg = build(RunConfig, load_config(name).to_dict())
    assert hydrax.cost(cfg.model, seq_len=cfg.data.seq_len).parameters > 0


@pytest.mark.parametrize(("variant", "parameters"), [("100m", 100e6), ("340m", 340e6), ("1b3", 1.3e9)])
def test_variants_have_the_size_in_their_name(variant, parameters):
    cfg = build(RunConfig, load_config(f"lm:{variant}").to_dict())
    result = hydrax.cost(cfg.model, seq_len=64)
    assert result.parameters - result.embedding_parameters == pytest.approx(parameters, rel=0.15)


def test_base_has_every_default_and_nothing_else():
    assert build(RunConfig, common.base().to_dict()) == RunConfig()


def test_overrides():
    config = load_config("quickstart", **{"model.pattern": "gla,attn", "train.steps": Raw("7"), "model.num_layers": 2})
    cfg = build(RunConfig, {**config.to_dict(), "optim": {"warmup": 1}})
    assert (cfg.model.pattern, cfg.train.steps, cfg.model.num_layers) == ("gla,attn", 7, 2)


def test_text_is_converted_by_the_declared_type():
    values = {"optim.lr": Raw("1e-2"), "optim.clip": Raw("none"), "model.tie": Raw("false"), "data.path": Raw("12")}
    cfg = build(RunConfig, load_config("quickstart", **values).to_dict())
    assert (cfg.optim.lr, cfg.optim.clip, cfg.model.tie, cfg.data.path) == (0.01, None, False, "12")


def test_text_that_a_config_sets_can_be_taken_back(tmp_path):
    path = write(
        tmp_path,
        "from configs import common\ndef get_config(arg=''):\n"
        "    config = common.base()\n    config.data.path = '/data'\n    return config\n",
    )
    cfg = load_config(path, **{"data.path": Raw("none")})
    assert build(RunConfig, cfg.to_dict()).data.path is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("False", False), ("None", None), ("none", "none"), ("head", "head")],
)
def test_options_of_mixers_are_free_form_until_the_mixer_reads_them(text, value):
    config = load_config("quickstart", **{"model.mixers.new.option": Raw(text)})
    assert config.model.mixers.new.option == value
    assert type(config.model.mixers.new.option) is type(value)  # json keeps it


@pytest.mark.parametrize(
    ("key", "value"), [("model.blocks", {"local": {"mixer": "swa"}}), ("optim.rates", {"*/ffn/*": 0.1, "embed/*": 0})]
)
def test_a_free_form_section_can_be_given_whole(key, value):
    config = load_config("quickstart", **{key: Raw(value)})
    assert config.to_dict()[key.split(".")[0]][key.split(".")[1]] == value


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "model.patern",
            r"model\.patern = 'x': unknown key; did you mean 'model\.pattern'\? allowed: blocks, d_model, ",
        ),
        ("lr", r"lr = 'x': unknown key; did you mean 'optim\.lr'\? allowed: data, "),
        ("modle.pattern", r"modle\.pattern = 'x': unknown key; did you mean 'model\.pattern'\?"),
        ("train.steps.more", r"train\.steps\.more = 'x': train\.steps is a single value and has no keys"),
        ("optim", r"optim = 'x': this is a section; expected optim\."),
        ("", r"^= 'x': unknown key; allowed: data, "),
    ],
)
def test_unknown_keys_are_refused(key, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", **{key: Raw("x")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"expected a Python file that defines get_config"),
        ("get_config = 1", r"expected a Python file that defines get_config"),
        ("def get_config(arg=''):\n    return 1 / 0\n", r"ZeroDivisionError: division by zero \(my\.py, line 2\)"),
        ("import no_such_module", r"ModuleNotFoundError: .*no_such_module.* \(my\.py, line 1\)"),
        ("def get_config(:", r"invalid syntax in line 1"),
        ("def get_config(arg=''):\n    return {}\n", r"get_config returned dict, expected ConfigDict"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert caught.value.key == "config"
    assert path in str(caught.value)


def test_a_missing_file_suggests_what_there_is():
    with pytest.raises(ConfigError, match=r"config = 'quickstrat': no such file; did you mean 'quickstart'\?"):
        load_config("quickstrat")


def test_arguments_take_the_type_of_their_default():
    assert common.parse_arg("b,ratio=7", variant="a", ratio=3, deep=False).to_dict() == {
        "variant": "b",
        "ratio": 7,
        "deep": False,
    }
    with pytest.raises(ConfigError, match=r"ratio = 'x': expected an integer"):
        common.parse_arg("ratio=x", ratio=3)
    with pytest.raises(ConfigError, match=r"rato = '3': unknown argument of the config; allowed: ratio"):
        common.parse_arg("rato=3", ratio=3)
