"""Whatever the user gets wrong ends in one line naming key, value and what is allowed; nothing is written."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.conftest import command_line, contents, run

# Arguments (after those every command needs) -> what the line must say.
SETTINGS = [
    # keys
    (["--config.model.foo=1"], r"model\.foo = '1': unknown key; .*allowed: .*pattern"),
    (["--config.optim.lrr=1"], r"optim\.lrr = '1': unknown key; did you mean 'optim\.lr'\?"),
    (["--config.modle.pattern=gla"], r"modle\.pattern = 'gla': unknown key; did you mean 'model\.pattern'\?"),
    (["--config.lr", "1"], r"lr = '1': unknown key; did you mean 'optim\.lr'\?"),
    (["--config.train.steps.x=1"], r"train\.steps\.x = '1': train\.steps is a single value"),
    (["--config.optim=adamw"], r"optim = 'adamw': this is a section; expected .*optim\.name"),
    (["--config.train.steps"], r"--config\.train\.steps = '': expected a value"),
    (["--config.train.steps", "--config.train.seed=1"], r"--config\.train\.steps = '': expected a value"),
    # types and ranges
    (["--config.train.steps=ten"], r"train\.steps = 'ten': expected an integer"),
    (["--config.train.steps=1.5"], r"train\.steps = '1\.5': expected an integer"),
    (["--config.train.steps=-5"], r"train\.steps = -5: expected an integer >= 1"),
    (["--config.train.steps", "-5"], r"train\.steps = -5: expected an integer >= 1"),
    (["--config.optim.lr=fast"], r"optim\.lr = 'fast': expected a number"),
    (["--config.optim.lr=nan"], r"optim\.lr = nan: expected a finite number"),
    (["--config.optim.lr=inf"], r"optim\.lr = inf: expected a finite number"),
    (["--config.optim.b2=1"], r"optim\.b2 = 1\.0: expected a number from 0 to below 1"),
    (["--config.train.steps=10000000000"], r"train\.steps = 10000000000: expected an integer of at most 1073741824"),
    (
        ["--config.model.mixers.gla.chunk_size=24"],
        r"model\.mixers\.gla\.chunk_size = 24: expected a positive multiple of 16",
    ),
    (["--config.optim.lr=0"], r"optim\.lr = 0\.0: expected a number > 0"),
    (["--config.model.tie=maybe"], r"model\.tie = 'maybe': expected true or false"),
    (["--config.data.val_fraction=2"], r"data\.val_fraction = 2\.0: expected a number from 0 to 1"),
    (["--config.sample.temperature=-1"], r"sample\.temperature = -1\.0: expected a number >= 0"),
    (["--config.sample.top_p=0"], r"sample\.top_p = 0\.0: expected a number above 0 and at most 1"),
    # choices
    (["--config.optim.name=adam"], r"optim\.name = 'adam': expected one of adamw, muon"),
    (["--config.optim.schedule=cosin"], r"optim\.schedule = 'cosin': expected one of constant, cosine"),
    (["--config.model.ffn=swigl"], r"model\.ffn = 'swigl': expected one of none, swiglu"),
    (["--config.train.dtype=fp16"], r"train\.dtype = 'fp16': expected one of auto, float32, bfloat16"),
    (["--config.train.remat=all"], r"train\.remat = 'all': expected one of none, offload, full"),
    (["--config.data.tokenizer=bytes"], r'data\.tokenizer = \'bytes\': expected "byte" or a tokenizer\.json'),
    # the model
    (["--config.model.pattern=2*(gla"], r"model\.pattern = '2\*\(gla': .*never closed"),
    (
        ["--config.model.pattern=gla,gln"],
        r"model\.pattern = 'gla,gln': 'gln' is neither a mixer nor a block; allowed: .*gla",
    ),
    (["--config.model.pattern=0*gla"], r"model\.pattern = '0\*gla': cannot read '0 \* gla'; expected"),
    (["--config.model.pattern="], r"model\.pattern = ''"),
    (["--config.model.pattern=every(3,gla,attn)"], r"model\.pattern = 'every\(3,gla,attn\)': .*needs num_layers"),
    (
        ["--config.model.pattern=select([7],attn,gla)", "--config.model.num_layers=2"],
        r"model\.pattern = .*: layer 7 does not exist among 2 layers",
    ),
    (["--config.model.num_layers=5"], r"model\.num_layers = 5: the pattern 'gla' has 1 layers"),
    (["--config.model.mixers.gla.heads=3"], r"model\.mixers\.gla\.heads = 3: expected a divisor of d_model = 16"),
    (["--config.model.mixers.gla.head=2"], r"model\.mixers\.gla\.head = 2: unknown key; did you mean 'heads'\?"),
    (["--config.model.mixers.gla.heads=two"], r"model\.mixers\.gla\.heads = 'two': expected an integer"),
    (["--config.model.mixers.glb.heads=2"], r"model\.mixers\.glb = .*: expected one of aaren, .*attn, .*gla"),
    (["--config.model.blocks.x.mixer=foo"], r"model\.blocks\.x\.mixer = 'foo': expected one of aaren, .*attn, .*gla"),
    (
        ["--config.model.pattern=attn", "--config.model.mixers.attn.kv_heads=3"],
        r"model\.mixers\.attn\.kv_heads = 3: expected a divisor of heads = 4",
    ),
    (
        ["--config.model.pattern=swa", "--config.model.mixers.swa.window=0"],
        r"model\.mixers\.swa\.window = 0: expected an integer >= 1",
    ),
    (["--config.model.vocab_size=100"], r"model\.vocab_size = 100: expected at least 259"),
    # the training
    (["--config.train.accumulate=3"], r"train\.accumulate = 3: expected a divisor of train\.batch_size = 8"),
    (["--config.train.batch_size=6"], r"train\.batch_size = 6: expected a multiple of 8"),
    (["--config.mesh.fsdp=3"], r"mesh = '.*fsdp=3.*': expected sizes whose product is the 8 devices"),
    (["--config.mesh.tensor=-1"], r"mesh = '.*tensor=-1': expected sizes .* at most one -1"),
    # the data
    (["--config.data.threads=1000"], r"data\.threads = 1000: expected an integer from 1 to 256"),
    (["--config.data.seq_len=1000000"], r"data\.seq_len = 1000000: expected at most \d+"),
    (["--config.data.path=/no/such/place"], r"data\.path = '/no/such/place': no such file or folder; expected text"),
    (["--config.data.path={folder}/empty"], r"data\.path = '.*/empty': no text files"),
    (["--config.data.path={folder}/*.none"], r"data\.path = '.*\*\.none': no file matches .*; expected"),
    (["--config.data.path={folder}/dangling.txt"], r"data\.path = '.*/dangling\.txt': .*link leads nowhere"),
    (["--config.data.path={folder}/pipe.txt"], r"data\.path = '.*/pipe\.txt': .*not a regular file"),
    (["--config.data.sources.web.wieght=2"], r"data\.path = '.*': expected None with data\.sources"),
    (["--config.data.path=none", "--config.data.sources.web.wieght=2"], r"data\.sources\.web\.wieght = 2: unknown key"),
    (["--config.data.path={folder}/no_text.jsonl"], r"data\.path = '.*no_text\.jsonl': line 2 .*\"text\" field"),
    (["--config.data.path={folder}/broken.jsonl"], r"data\.path = '.*broken\.jsonl': line 1 .*\"text\" field"),
    # what training only needs later
    (["--config.train.probes.mqar.pairs=2"], r"train\.probes\.mqar = 'mqar': expected a task in bytes"),
    (["--config.train.init_from={folder}/gone"], r"train\.init_from = '.*/gone': expected the folder of a run"),
    (["--config.train.init_from={folder}@last"], r"train\.init_from = '.*@last': expected <folder>, <folder>@<step>"),
    (["--workdir={folder}/nothing.py/run"], r"workdir = '.*': it cannot be made \(Not a directory\); expected"),
    # config files
    (["--config={folder}/missing.py"], r"config = '.*missing\.py': no such file; .*quickstart"),
    (["--config=quickstrat"], r"config = 'quickstrat': no such file; did you mean 'quickstart'\?"),
    (["--config={folder}/nothing.py"], r"config = '.*nothing\.py': expected a Python file that defines get_config"),
    (
        ["--config={folder}/raises.py"],
        r"config = '.*raises\.py': ZeroDivisionError: division by zero \(raises\.py, line 2\)",
    ),
    (["--config=lm:2b"], r"variant = '2b': expected one of 50m, 100m, 340m, 1b3"),
    (["--config=lm:ratio=x"], r"ratio = 'x': expected an integer"),
    # flags
    (["--steps=3"], r"--steps = '3': unknown flag; allowed: --config, --workdir, .*, --config\.<key>"),
    (["--processes=2"], r"--coordinator = None: expected with the others of --coordinator, --processes, --process_id"),
    (["--coordinator=h", "--processes=2", "--process_id=0"], r"--coordinator = 'h': expected host:port of process 0"),
    (["--coordinator=h:1", "--processes=2", "--process_id=2"], r"--process_id = 2: expected less than --processes = 2"),
    (["--work_dir=x"], r"--work_dir = 'x': unknown flag; did you mean --workdir\?"),
    (["--workdir="], r"--workdir = '': expected the run folder"),
    (["quickstart"], r"quickstart = '': unexpected argument; expected --config, --workdir"),
]
OTHERS = [
    ("cost", ["--seq_len=0"], r"--seq_len = '0': expected a positive integer"),
    ("cost", ["--batch=many"], r"--batch = 'many': expected a positive integer"),
    ("cost", ["--seq_lem=3"], r"--seq_lem = '3': unknown flag; did you mean --seq_len\?"),
    ("cost", ["--config.model.d_model=0"], r"model\.d_model = 0: expected an integer >= 1"),
    ("cost", ["--config.model.pattern=gln"], r"model\.pattern = 'gln': 'gln' is neither a mixer nor a block"),
    ("cost", ["--compare"], r"--compare = '': expected "),
    ("cost", ["--mesh=fsdp=0"], r"mesh = 'fsdp=0': expected <axis>=<devices>"),
    ("cost", ["--mesh=fsdp=2", "--compare=attn"], r"mesh = 'fsdp=2': expected no --compare beside it"),
    ("cost", ["--compare="], r"model\.pattern = '': "),
    ("cost", ["--compare=gln"], r"model\.pattern = 'gln': 'gln' is neither a mixer nor a block"),
    ("cost", ["--compare=quick:strat"], r"config = 'quick': no such file; did you mean 'quickstart'\?"),
    ("cost", ["--compare={folder}/missing.py"], r"config = '.*missing\.py': no such file"),
    ("cost", ["--compare=model.patern=gla"], r"model\.patern = 'gla': unknown key; did you mean 'model\.pattern'\?"),
    ("cost", ["--compare=model.d_model=0"], r"model\.d_model = 0: expected an integer >= 1"),
    ("cost", ["--compare=model.d_model=8; attn"], r"compare = 'attn': expected <key>=<value> behind a semicolon"),
    ("cost", ["--match=flops"], r"match = 'flops': expected another model to be matched to the first"),
    (
        "cost",
        ["--compare=attn", "--match=flop"],
        r"match = 'flop': expected one of none, parameters, active, flops, cache",
    ),
    ("cost", ["--compare=attn", "--knob=d_model"], r"knob = 'd_model': needs match = one of parameters"),
    ("cost", ["--compare=attn", "--match=flops", "--knob=ffn"], r"model\.ffn = 1: expected one of none, swiglu"),
    ("cost", ["--compare=attn", "--match=cache", "--knob=ffn_dim"], r"model\.ffn_dim = 8: it changes nothing here"),
    ("cost", ["--compare=64*gla", "--match=flops"], r"model\.ffn_dim = 8: the closest value, \+.*% flops; expected"),
    ("cost", ["--json={folder}/x.txt"], r"json = '.*/x\.txt': expected a path that ends in \.json"),
    ("cost", ["--json={folder}/nothing.py/x.json"], r"json = '.*/x\.json': cannot be written \(.*\)"),
    ("sample", ["--temperature=-1"], r"temperature = -1\.0: expected a number >= 0"),
    ("sample", ["--temperature=nan"], r"--temperature = nan: expected a finite number"),
    ("sample", ["--top_p=0"], r"top_p = 0\.0: expected a number above 0 and at most 1"),
    ("sample", ["--top_p=1.5"], r"top_p = 1\.5: expected a number above 0 and at most 1"),
    ("sample", ["--tokens=0"], r"--tokens = '0': expected an integer in the range \[1, 1073741824\]"),
    ("sample", ["--seed=99999999999"], r"--seed = '99999999999': expected an integer in the range \[0, 1073741824\]"),
    ("sample", ["--workdir={folder}/empty"], r"workdir = '.*/empty': expected the folder of a run"),
    ("sample", ["--workdir={folder}/missing"], r"workdir = '.*/missing': expected the folder of a run"),
    ("sample", ["--config.sample.tokens=3"], r"--config\.sample\.tokens = '3': unknown flag; allowed: --workdir"),
    ("sample", ["--policy=h2o"], r"policy = 'h2o': expected one of accumulated, .*, streaming"),
    ("sample", ["--policy=hip:leaf=0"], r"policy\.hip\.leaf = 0: expected an integer >= 1"),
    ("evaluate", ["--suite=policy"], r"suite = 'policy': expected policy:<name\[;option=value\]>"),
    ("evaluate", ["--workdir={folder}/empty"], r"workdir = '.*/empty': expected the folder of a run"),
    ("evaluate", ["--suite=perplexty"], r"suite = 'perplexty': expected some of perplexity, .*, lm_eval:<task>"),
    ("evaluate", ["--suite=perplexity:3"], r"suite = 'perplexity:3': expected some of perplexity, .*recall_slices\[:"),
    ("evaluate", ["--suite=recall"], r"suite = 'recall': expected recall:<kind>=<file>"),
    ("evaluate", ["--suite=lm_eval:"], r"suite = 'lm_eval:': expected some of perplexity"),
    ("evaluate", ["--suite="], r"suite = '': expected some of perplexity"),
    ("evaluate", ["--workdir="], r"workdir = '': expected run folders"),
    ("evaluate", ["--suite=recall_slices:1"], r"suite = 'recall_slices:1': expected recall_slices:<n"),
    ("evaluate", ["--suite=recall:fda={folder}/gone"], r"recall:fda = '.*/gone': expected a file of JSON Lines"),
    ("evaluate", ["--suite=policy:h2o"], r"policy = 'h2o': expected one of accumulated, .*, streaming"),
    ("evaluate", ["--factor=1"], r"--factor = '1': expected integer >= 2"),
    ("bench", ["--mixers=gla,gln"], r"mixers = 'gln': expected all, or some of .*gla"),
    ("bench", ["--mixers="], r"mixers = '': expected all, or some of .*gla"),
    ("bench", ["--mixers=gla", "--d_model=18"], r"mixers\.gla\.heads = 4: expected a divisor of d_model = 18"),
    ("bench", ["--d_model=0"], r"--d_model = '0': expected a positive integer"),
    ("bench", ["--scaling", "--cells=("], r"cells = '\(': expected a regular expression"),
    ("bench", ["--scaling", "--devices=0"], r"devices\[0\] = 0: expected an integer >= 1"),
    ("bench", ["--batch=-1"], r"--batch = '-1': expected a positive integer"),
    ("bench", ["--seq_lens=64,4k"], r"seq_lens\[1\] = '4k': expected an integer"),
    ("bench", ["--seq_lens=0"], r"seq_lens\[0\] = 0: expected an integer >= 1"),
    ("bench", ["--dtype=fp16"], r"dtype = 'fp16': expected one of float32, bfloat16"),
    (
        "bench",
        ["--mixers=gla", "--impl=fast"],
        r"impl = 'fast': linear_attention: .*expected one of recurrent, chunked",
    ),
    (
        "bench",
        ["--mixers=gla", "--impl=gla=chunked"],
        r"impl = 'gla=chunked': 'gla' is no op; expected <op>=<form> with",
    ),
    ("bench", ["--repeats=0"], r"--repeats = '0': expected a positive integer"),
    ("bench", ["--seconds=0"], r"seconds = 0\.0: expected a number > 0"),
    ("bench", ["--threads=two"], r"--threads = 'two': expected a positive integer"),
    ("bench", ["--out={folder}/table.txt"], r"out = '.*/table\.txt': expected a path that ends in \.json"),
    (
        "bench",
        ["--out={folder}/nothing.py/x.json"],
        r"out = '.*/x\.json': cannot be written \(.*\); expected a new file",
    ),
    ("bench_attention", ["--subjects=mla"], r"subjects = 'mla': expected all, or some of cudnn, plain"),
    ("bench_averages", ["--subjects=fft"], r"subjects = 'fft': expected all, or some of real_chunks_16"),
    ("bench_attention", ["--widths=64,x"], r"widths\[1\] = 'x': expected an integer"),
    ("bench_attention", ["--seq_lens=0"], r"seq_lens\[0\] = 0: expected an integer >= 1"),
    (
        "bench_attention",
        ["--subjects=plain", "--out={folder}/x.txt"],
        r"out = '.*/x\.txt': expected a path that ends in",
    ),
    ("bench_kernels", ["--problems=lstm"], r"problems = 'lstm': expected all, or some of constant, scalar"),
    ("bench_kernels", ["--shapes=8x64"], r"shapes = '8x64': expected rows x tokens x heads x width"),
    ("bench_kernels", ["--shapes=0x64x1x64"], r"shapes = '0x64x1x64': expected rows x tokens x heads x width"),
    ("bench_kernels", ["--peer=apex"], r"peer = 'apex': expected auto, none or one of fla"),
    ("bench_train", ["--variants=train.remat"], r"variants = 'train\.remat': expected key=value"),
    ("bench_train", ["--variants=train.remat=all"], r"train\.remat = 'all': expected one of none"),
    ("bench_train", ["--out={folder}/table.txt"], r"out = '.*/table\.txt': expected a path that ends in \.json"),
    ("compile_time", ["--patterns=gla;gln"], r"model\.pattern = 'gln': 'gln' is neither a mixer nor a block"),
    ("compile_time", ["--out={folder}/table.txt"], r"out = '.*/table\.txt': expected a path that ends in \.json"),
    ("compile_time", ["--out={folder}/nothing.py/x.json"], r"out = '.*/x\.json': cannot be written \(.*\); expected"),
    ("prepare", ["--source={folder}/missing"], r"source = '.*/missing': no such file or folder"),
    ("prepare", ["--source={folder}/empty"], r"source = '.*/empty': no text files"),
    ("prepare", ["--source={folder}/pipe.txt"], r"source = '.*/pipe\.txt': pipe\.txt is not a regular file"),
    ("prepare", ["--source="], r"--source = '': expected file, folder or glob"),
    ("prepare", ["--tokenizer=bytes"], r"tokenizer = 'bytes': expected \"byte\" or a tokenizer\.json"),
    ("prepare", ["--processes=-1"], r"--processes = '-1': expected a non-negative integer"),
    ("prepare", ["--val_fraction=nan"], r"--val_fraction = nan: expected a finite number"),
    ("prepare", ["--val_fraction=2"], r"--val_fraction = '2': expected a number in the range \[0, 1\]"),
    ("prepare", ["--out={folder}/nothing.py"], r"out = '.*/nothing\.py': expected a folder"),
    ("prepare", ["--out={folder}"], r"out = '.*': the folder holds 'broken\.jsonl'; expected a new folder"),
    ("bench", ["--seq_len=64"], r"--seq_len = '64': unknown flag; did you mean --seq_lens\?"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of which each is wrong in one way."""
    place = tmp_path_factory.mktemp("bad")
    (place / "empty").mkdir()
    (place / "dangling.txt").symlink_to(place / "gone")
    os.mkfifo(place / "pipe.txt")
    (place / "no_text.jsonl").write_text('{"text": "fine"}\n{"body": "no"}\n')
    (place / "broken.jsonl").write_text("{text: fine\n")
    (place / "nothing.py").write_text("x = 1\n")
    (place / "raises.py").write_text("def get_config(arg=''):\n    return 1 / 0\n")
    return place


def assert_refused(outcome, pattern):
    assert outcome.code == 2, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert re.search(f"^error: {pattern}", lines[0]), lines[0]


@pytest.mark.parametrize(("args", "pattern"), SETTINGS, ids=[" ".join(row[0]) for row in SETTINGS])
def test_training_refuses(args, pattern, config, folder, tmp_path):
    args = [a.replace("{folder}", str(folder)) for a in args]
    before = contents(folder)
    outcome = run("train", *command_line("train", config, tmp_path / "run", args))
    assert_refused(outcome, pattern)
    assert contents(folder) == before
    assert not any(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(("command", "args", "pattern"), OTHERS, ids=[" ".join([r[0], *r[1]]) for r in OTHERS])
def test_other_commands_refuse(command, args, pattern, config, folder, tmp_path):
    args = [a.replace("{folder}", str(folder)) for a in args]
    outcome = run(command, *command_line(command, config, tmp_path / "run", args))
    assert_refused(outcome, pattern)
    assert outcome.out == ""
    assert not any(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(("command", "flag"), [("train", "workdir"), ("train", "config"), ("sample", "workdir")])
def test_a_missing_flag_is_named(command, flag, config, tmp_path):
    args = [a for a in command_line(command, config, tmp_path, []) if not a.startswith(f"--{flag}=")]
    assert_refused(run(command, *args), rf"--{flag} = None: this flag is required: ")


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    outcome = run("train", *command_line("train", config, tmp_path, []))
    assert_refused(
        outcome, r"workdir = '.*': the folder holds 'thesis\.tex' but no config\.json; expected a new folder"
    )
    assert contents(tmp_path) == before


def test_a_file_is_no_run_folder(config, tmp_path):
    (tmp_path / "run").write_text("x")
    outcome = run("train", *command_line("train", config, tmp_path / "run", []))
    assert_refused(outcome, r"workdir = '.*/run': expected a folder")
    assert (tmp_path / "run").read_text() == "x"


def test_the_folder_of_another_run_is_left_alone(config, finished):
    before = contents(finished)
    outcome = run("train", *command_line("train", config, finished, ["--config.model.d_model=32"]))
    assert_refused(outcome, r"workdir = '.*': .*another config.* model\.d_model: 16 -> 32")
    assert contents(finished) == before


def damage(workdir: pathlib.Path) -> None:
    """Flips a byte in the middle of every large file of every checkpoint."""
    files = [p for p in (workdir / "checkpoints").rglob("*") if p.is_file() and p.stat().st_size > 1000]
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


@pytest.mark.parametrize("command", ["train", "sample"])
def test_damaged_checkpoints_are_refused(command, config, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()  # as if it had been interrupted
    damage(workdir)
    before = contents(workdir / "checkpoints")
    outcome = run(command, *command_line(command, config, workdir, []))
    assert_refused(outcome, r"workdir = '.*': all its checkpoints are damaged \(2\)")
    assert contents(workdir / "checkpoints") == before


@pytest.mark.parametrize(
    ("command", "args", "pattern"),
    [
        (
            "train",
            ["--workdir={run}", "--config=quickstart", "--config.optim.lrr=1"],
            r"error: optim\.lrr = '1': unknown key",
        ),
        ("sample", ["--workdir={run}"], r"error: workdir = '.*': expected the folder of a run"),
        ("cost", ["--confg=quickstart"], r"error: --confg = 'quickstart': unknown flag; did you mean --config\?"),
        ("bench", ["--mixers=gln", "--out={run}/x.json"], r"error: mixers = 'gln': expected all, or some of "),
    ],
)
def test_as_processes(command, args, pattern, tmp_path):
    args = [a.replace("{run}", str(tmp_path / "run")) for a in args]
    line = [sys.executable, "-W", "error::UserWarning", "-m", f"launch.{command}", *args]
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(f"{pattern}.*\n", result.stderr), result.stderr
    assert not any(tmp_path.iterdir())
