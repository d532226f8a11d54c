"""Recipes: what is refused, how it is said, and that saving loses nothing."""

from pathlib import Path

import pytest

from pipeline.config.loading import load_recipe, recipe_names, save_recipe

SMALL = """
corpus: {source: a.jsonl}
teacher: {model: t}
dump: {path: d}
train: {lr: 1e-5}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_good_and_survives_saving(name, tmp_path):
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_one_e_minus_five_is_a_number_though_yaml_1_1_reads_text(tmp_path):
    path = written(tmp_path, SMALL)
    assert load_recipe(path).train.lr == 1e-5
    assert load_recipe(path, ["train.lr=3E-4"]).train.lr == 3e-4
    assert load_recipe(path, ["dump.path=run-1e"]).dump.path == "run-1e"


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_packing_is_what_is_written_though_yaml_1_1_reads_a_boolean(value, tmp_path):
    recipe = load_recipe("demo", [f"train.packing={value}"])
    save_recipe(recipe, tmp_path / "again.yaml")
    assert recipe.train.packing == load_recipe(tmp_path / "again.yaml").train.packing == value


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"line 6.*'corpus' is given twice"):
        load_recipe(written(tmp_path, SMALL + "corpus: {source: b.jsonl}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr: 'lrr' is not a key of train; did you mean 'lr'"),
        ("corpus.exclude=[{sorce: x}]", "not a key of corpus.exclude.0; did you mean 'source'"),
        ("dump.covering.beam_widt=0", "did you mean 'beam_width'"),
        ("tran.lr=1", "not a key of a recipe; did you mean 'train'"),
        ("train.lr=fast", "train.lr: 'fast'"),
        ("train.steps=0", "train.steps: 0"),
        ("dump.path.x=1", "dump.path is 'd', which has no keys"),
        ("train.lr", "neither of the form section.key=value, nor a YAML file, nor one of alm, .*paper"),
        ("..=1", "not of the form section.key=value"),
        ("train.lr=[1", "override 'train.lr=\\[1'"),
        ("teacher.overlap_tokens=2000", "at most half of teacher.max_tokens"),
        ("train.steps=true", "train: steps is True, but must be a number"),
        ("train.lr=.inf", "train.lr: inf"),
        ("train.seed=-1", "train.seed: -1"),
        ("dump.path=''", "dump.path: ''"),
        ('dump.path="a\\0b"', r"dump: path is 'a\\x00b', which holds a NUL character"),
        ("train.steps=99999999999999999999", "train: steps is 99999999999999999999, beyond 9223372036854775807"),
        ("train.steps=1e30", r"train.steps: 1e\+30"),
        ("dump.shard_bytes=0", "dump.shard_bytes: 0: .*greater than or equal to 1"),
        ("dump.shard_bytes=-5", "dump.shard_bytes: -5"),
        ("dump.shard_bytes=1e30TB", "dump.shard_bytes: '1e30TB'"),
        ("placement.batch_tokens=-1", "placement.batch_tokens: -1: .*greater than or equal to 16"),
        ("corpus.limit=0", "corpus.limit: 0: .*greater than or equal to 1"),
        ("train.betas=[0.9, 1.5]", r"train.betas.1: 1.5: .*less than 1"),
    ],
)
def test_a_bad_override_is_named_with_what_would_be_right(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(written(tmp_path, SMALL), [override])


@pytest.mark.parametrize(
    "source", ["https://me:geheim@h/c.jsonl", "https://h/c.jsonl?key=geheim", "s3://geheim@b/c.jsonl"]
)
def test_a_key_in_an_address_is_refused_unseen(tmp_path, source):
    for key in ("corpus.source", "eval.source", "corpus.exclude.0.source"):
        overrides = ["corpus.exclude=[{source: x}]", f"{key}={source}"]
        with pytest.raises(ValueError, match=rf"{key}: an address must hold no user, password") as error:
            load_recipe(written(tmp_path, SMALL), overrides)
        assert "geheim" not in str(error.value)


def test_a_recipe_that_is_no_text_is_named_with_its_first_wrong_byte(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"corpus: \xff")
    for arguments in ((tmp_path / "r.yaml",), ("demo", [str(tmp_path / "r.yaml")])):
        with pytest.raises(ValueError, match=r"r\.yaml is not UTF-8 text \(its byte 8 is invalid\)"):
            load_recipe(*arguments)


LAUGHS = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS + "corpus: {source: *a9}", r"line \d: its aliases expand to more than 10000 values"),
        ("corpus: &a {source: *a}", "nested more than 30 deep"),
        ("corpus: " + "[" * 50_000, "nested more than 30 deep"),
        ("corpus: !!python/object/apply:os.system ['id']", "could not determine a constructor"),
        ("corpus: {source: \x00}", "unacceptable character"),
    ],
)
def test_yaml_that_is_an_attack_is_refused_at_once(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(written(tmp_path, text))


def test_sections_may_share_what_an_anchor_names(tmp_path):
    text = (
        "corpus: &text {source: a.jsonl, limit: 3}\nteacher: {model: t}\ndump: {path: d}\neval: {<<: *text, limit: 5}"
    )
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.eval is not None
    assert (recipe.eval.source, recipe.eval.limit, recipe.corpus.limit) == ("a.jsonl", 5, 3)


def test_an_override_may_be_a_file_of_some_keys(tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("corpus: {limit: 3}\ntrain: {steps: 7}", encoding="utf-8")
    recipe = load_recipe(written(tmp_path, SMALL), ["corpus.limit=2", str(over), "train.steps=8"])
    assert (recipe.corpus.limit, recipe.corpus.source, recipe.train.steps, recipe.train.lr) == (3, "a.jsonl", 8, 1e-5)
    over.write_text("trian: {steps: 7}", encoding="utf-8")
    with pytest.raises(ValueError, match="did you mean 'train'"):
        load_recipe(written(tmp_path, SMALL), [str(over)])
    over.write_text("- 1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"over\.yaml must hold sections"):
        load_recipe(written(tmp_path, SMALL), [str(over)])


@pytest.mark.parametrize("name", recipe_names())
def test_the_papers_own_settings_are_one_override_away(name):
    recipe = load_recipe(name, ["paper"])
    assert recipe.student is not None
    assert (recipe.student.interface, recipe.student.averaged_row_scale) == ("linear", 1)
    assert (recipe.student.max_token_end, recipe.student.max_dropped, recipe.student.max_doubt) == (1, 1, 1)
    assert active(recipe) == {"ce": 1, "byte_ce": 1, "kl": 0.1}


def active(recipe):
    return {name: weight for name, weight in recipe.train.objectives.model_dump().items() if weight}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("alm", {"alm": 1}),
        ("alm_sft", {"ce": 1, "alm": 1}),
        ("bpm", {"bpm_kl": 1}),
        ("cdm", {"ce": 0.5, "cdm": 0.5}),
        ("gold", {"gold": 1}),
        ("mined", {"mined": 1}),
        ("strict", {"strict_kl": 1}),
        ("token_kl", {"token_kl": 1}),
        ("uld", {"ce": 1, "uld": 1.5}),
        ("xtoken", {"ce": 1, "xtoken_kl": 1}),
    ],
)
def test_a_methods_own_settings_are_one_override_away_for_dump_and_student(name, weights):
    recipe = load_recipe("demo", [name])
    assert active(recipe) == weights and recipe.dump.tokens.top_k == 16


def test_a_missing_recipe_names_the_packaged_ones():
    with pytest.raises(ValueError, match="demo"):
        load_recipe("demmo")


def test_the_two_demos_share_one_dump():
    first, second = load_recipe("demo"), load_recipe("demo_mistral")
    assert (first.corpus, first.teacher, first.dump) == (second.corpus, second.teacher, second.dump)
    assert first.student is not None
    assert second.student is not None
    assert first.student.path != second.student.path
