"""Recipes: rendered from stack.yml, the same each time, taken by both nuclei; and what the linter finds in others."""

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deploy.errors import RecipeError
from deploy.greengrass.build import lint_folder, read, render
from deploy.greengrass.lint import RECIPE_BYTES, lint
from deploy.greengrass.merge import Change, changes, request, spec
from deploy.greengrass.recipe import MOST_MODEL_FILES, PORTS, Naming, text
from deploy.greengrass.wheels import PipGather, build_own, lock
from deploy.local.plan import WATCHDOG_KEYS
from deploy.stack import load, parse
from tests.greengrass_rigs import DEVICE, DISPATCHER, PREFIX, ROOT, Wheels, rendered, stack, tier
from tests.nucleus import Nucleus

NAMING = Naming(PREFIX, "1.0.0", "tests", "3.11")


@pytest.fixture
def built(tmp_path):
    return {component.name: component for component in rendered(tmp_path / "out")}


@pytest.fixture
def recipe(built):
    """The dispatcher's, to be spoilt."""
    return yaml.safe_load(built[DISPATCHER].recipe)


def test_every_function_of_the_stack_has_a_recipe_that_both_nuclei_take(tmp_path):
    models = {"device": tier(tmp_path / "device"), "edge": tier(tmp_path / "edge", 92)}
    whole = load(ROOT / "stack.yml", {})
    built = render(whole, models, Wheels(), NAMING, tmp_path / "out")
    assert {component.name for component in built} == {NAMING.component(name) for name in whole.functions}
    assert set(PORTS) == set(whole.functions)
    for problems in lint_folder(tmp_path / "out").values():
        assert problems == []
    for component in built:
        found = yaml.safe_load(component.recipe)
        platforms = [m["Platform"] for m in found["Manifests"]]
        assert [p["architecture"] for p in platforms] == ["amd64", "aarch64"]
        assert {(p["os"], p["runtime"]) for p in platforms} == {("linux", "*")}


def test_all_that_stack_yml_sets_reaches_the_function_by_way_of_the_configuration(built, tmp_path):
    """The watchdog's keys apart, and but for what the core device itself decides."""
    nucleus = Nucleus(tmp_path / "root", "aarch64")
    for name, component in (("dispatcher", built[DISPATCHER]), ("device", built[DEVICE])):
        wanted = {key for key in stack(name).functions[name].environment if key not in WATCHDOG_KEYS}
        lifecycle = yaml.safe_load(component.recipe)["Manifests"][1]["Lifecycle"]
        assert wanted <= set(lifecycle["Setenv"])
        for key in wanted - {"NODE_ID", "MODEL_PATH"}:
            assert lifecycle["Setenv"][key] == f"{{configuration:/{key}}}"
        script = nucleus.words(component, "run")[-1]
        assert "export NODE_ID=kiosk-1" in script
        assert script.splitlines()[-1].startswith('exec "')
    assert "export DEVICE_URL=http://127.0.0.1:8081" in nucleus.words(built[DISPATCHER], "run")[-1]
    nucleus.configuration[DISPATCHER] = {"EDGE_URL": "https://store.example/function/edge"}
    assert "export EDGE_URL=https://store.example/function/edge" in nucleus.words(built[DISPATCHER], "run")[-1]


def test_the_dispatcher_depends_softly_on_the_tiers_of_its_own_site_alone(built, tmp_path):
    found = yaml.safe_load(built[DISPATCHER].recipe)
    assert found["ComponentDependencies"] == {DEVICE: {"VersionRequirement": ">=1.0.0", "DependencyType": "SOFT"}}
    assert "ComponentDependencies" not in yaml.safe_load(built[DEVICE].recipe)
    assert [component.name for component in read(tmp_path / "out")] == [DEVICE, DISPATCHER]


def test_the_same_stack_gives_the_same_bytes_and_other_content_another_address(built, tmp_path):
    again = {component.name: component for component in rendered(tmp_path / "again")}
    other = {component.name: component for component in rendered(tmp_path / "other", content="2")}
    for name, component in built.items():
        assert again[name].recipe == component.recipe
        assert other[name].recipe != component.recipe
    shared = set(built[DEVICE].artifacts) & set(other[DEVICE].artifacts)
    assert all(".zip" not in key for key in shared)  # the tier stays, the code moved
    assert len(shared) == 4


def test_a_tier_lies_unzipped_and_one_of_too_many_files_in_a_stored_zip(tmp_path):
    few, many = tier(tmp_path / "few", MOST_MODEL_FILES - 1), tier(tmp_path / "many", MOST_MODEL_FILES)
    for folder, path, names in (
        (few, "{artifacts:path}", MOST_MODEL_FILES),
        (many, "{artifacts:decompressedPath}/model", 1),
    ):
        built = render(stack("device"), {"device": folder}, Wheels(), NAMING, tmp_path / "out")[0]
        setenv = yaml.safe_load(built.recipe)["Manifests"][0]["Lifecycle"]["Setenv"]
        assert setenv["MODEL_PATH"] == path
        assert len(built.artifacts) == names + 2
        nucleus = Nucleus(tmp_path / f"root-{names}", "amd64")
        nucleus.place(built)
        placed = nucleus.expand(built, path)
        for file in folder.iterdir():
            assert (tmp_path / placed / file.name).read_bytes() == file.read_bytes()


def test_a_rendering_replaces_a_rendering_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    rendered(out)
    rendered(out, "2.0.0", only=("dispatcher",))
    assert [path.name for path in (out / "recipes").iterdir()] == [f"{DISPATCHER}-2.0.0.yaml"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(RecipeError, match="holds something else"):
        rendered(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


def test_a_rendering_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "out"
    rendered(out)
    before = sorted(path.name for path in out.rglob("*"))

    def no_wheels(function, architecture, folder):
        raise RecipeError("no wheels today")

    with pytest.raises(RecipeError, match="no wheels today"):
        render(stack("dispatcher"), {}, no_wheels, NAMING, out)
    assert sorted(path.name for path in out.rglob("*")) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tier"}


def test_an_artifact_changed_after_rendering_is_found(built, tmp_path):
    next(iter(built[DISPATCHER].artifacts.values())).write_bytes(b"other")
    with pytest.raises(RecipeError, match="is not what its recipe was made for; render again"):
        read(tmp_path / "out")


@pytest.mark.parametrize(
    ("stack_yml", "says"),
    [
        ("functions: {cloud: {image: i, handler: h, fprocess: p}}", "function 'cloud' has no port"),
        ("functions: {edge: {image: i, handler: h, fprocess: python x}}", "the fprocess of 'edge' has no '--bind …'"),
    ],
)
def test_a_function_that_cannot_be_a_component_is_refused_by_name(stack_yml, says, tmp_path):
    with pytest.raises(RecipeError, match=says):
        render(parse(stack_yml, {}), {}, Wheels(), NAMING, tmp_path / "out")


@pytest.mark.parametrize("content", [None, "{}", '{"files": {"gone.safetensors": {}}}', '{"files": {"../x": {}}}'])
def test_a_folder_that_is_no_tier_is_refused(content, tmp_path):
    (tmp_path / "tier").mkdir()
    if content:
        (tmp_path / "tier" / "manifest.json").write_text(content)
    with pytest.raises(RecipeError, match=r"holds no tier|lacks"):
        render(stack("device"), {"device": tmp_path / "tier"}, Wheels(), NAMING, tmp_path / "out")


# ---- the linter ----


def run_step(recipe):
    return recipe["Manifests"][0]["Lifecycle"]["run"]


def lifecycle(recipe):
    return recipe["Manifests"][0]["Lifecycle"]


def platform(recipe):
    return recipe["Manifests"][0]["Platform"]


def configuration(recipe):
    return recipe["ComponentConfiguration"]["DefaultConfiguration"]


def renamed(mapping, old, new):
    mapping[new] = mapping.pop(old)


SPOILT = [
    (lambda r: renamed(r, "ComponentName", "componentName"), "'componentName' is written 'ComponentName'"),
    (lambda r: renamed(lifecycle(r), "install", "Install"), "'Install' is written 'install'"),
    (lambda r: renamed(run_step(r), "Script", "script"), "'script' is written 'Script'"),
    (lambda r: renamed(lifecycle(r), "Setenv", "setenv"), "'setenv' is written 'Setenv'"),
    (lambda r: renamed(r["Manifests"][0]["Artifacts"][0], "Uri", "URI"), "'URI' is written 'Uri'"),
    (lambda r: r.pop("ComponentDescription"), "the recipe needs 'ComponentDescription'"),
    (lambda r: r.update(ComponentDescription="two\nlines"), "must be one line"),
    (lambda r: r.update(ComponentName="com.example.a b"), "ComponentName must be"),
    (lambda r: r.update(ComponentName="x" * 129), "ComponentName must be"),
    (lambda r: r.update(ComponentVersion="1.0"), "ComponentVersion must be a semantic version"),
    (lambda r: r.update(ComponentVersion="1.0.0-" + "x" * 60), "ComponentVersion must be a semantic version"),
    (lambda r: r.update(RecipeFormatVersion="2021-01-25"), "RecipeFormatVersion must be"),
    (lambda r: r.update(ComponentType="aws.greengrass.lambda"), "the lite nucleus runs no other"),
    (lambda r: r.update(Manifests=[]), "Manifests must be a list"),
    (lambda r: r["ComponentDependencies"][DEVICE].update(DependencyType="HARD"), "is HARD"),
    (lambda r: r["ComponentDependencies"][DEVICE].update(DependencyType="soft"), "DependencyType is SOFT or HARD"),
    (lambda r: platform(r).pop("runtime"), "needs 'runtime'"),
    (lambda r: platform(r).update(runtime="aws_nucleus_classic"), "runtime must be '*'"),
    (lambda r: platform(r).update(architecture="/amd64|x86/"), "the lite nucleus knows no patterns"),
    (lambda r: platform(r).update(os="windows"), "os must be linux"),
    (lambda r: lifecycle(r).update(shutdown="true"), "the lite nucleus has no 'shutdown'"),
    (lambda r: lifecycle(r).update(recover="true"), "the lite nucleus has no 'recover'"),
    (lambda r: run_step(r).update(Skipif="onpath git"), "the lite nucleus has no 'Skipif'"),
    (lambda r: lifecycle(r).update(run=["exec a", "exec b"]), "takes no list"),
    (lambda r: lifecycle(r).update(startup={"Script": "x", "Timeout": 9}), "startup and run"),
    (lambda r: [lifecycle(r).pop(p) for p in ("install", "run")], "has no phase"),
    (lambda r: run_step(r).update(Timeout=60), "Timeout would end the function"),
    (lambda r: lifecycle(r)["install"].pop("Timeout"), "Timeout is missing"),
    (lambda r: lifecycle(r)["install"].update(Timeout=5000), "Timeout must be whole seconds"),
    (lambda r: lifecycle(r)["install"].update(Timeout="15 min"), "Timeout must be whole seconds"),
    (lambda r: run_step(r).update(Script="python main.py"), "must end with 'exec …'"),
    (lambda r: run_step(r).update(Script="exec a ${HOME}"), "'{HOME' is no variable"),
    (lambda r: run_step(r).update(Script="f() { true; }; exec f"), "is no variable"),
    (lambda r: run_step(r).update(Script="exec a '{\"b\": 1}'"), "is no variable"),
    (lambda r: run_step(r).update(Script="exec a {work:path"), "is no variable"),
    (lambda r: run_step(r).update(Script="exec {com.example.Other:artifacts:path}/a"), "is no variable"),
    (lambda r: run_step(r).update(Script="exec {configuration:/NOWHERE}"), "has no default"),
    (lambda r: run_step(r).update(Script="exec {artifacts:decompressedPath}/lost/a"), "no artifact lost.zip"),
    (lambda r: run_step(r).update(Script="exec a " + "x" * 10_000), "at most 10000 bytes"),
    (lambda r: run_step(r).update(RequiresPrivilege="maybe"), "RequiresPrivilege is true or false"),
    (lambda r: lifecycle(r)["Setenv"].update(X=1), "'X' must be text"),
    (lambda r: lifecycle(r)["Setenv"].update({"a-b": "1"}), "'a-b' is no name of a variable"),
    (lambda r: lifecycle(r)["Setenv"].update(X='{"a": 1}'), "Setenv X: "),
    (lambda r: configuration(r).update(PORT=8080), "configuration /PORT must be text"),
    (lambda r: configuration(r).update(A={"B": 1.5}), "configuration /A/B must be text"),
    (lambda r: configuration(r).update(A="{iot:thingName}"), "configuration /A holds a '{'"),
    (lambda r: configuration(r)["accessControl"].update(s={"p": {"operations": ["x"]}}), "needs a list of resources"),
    (
        lambda r: configuration(r)["accessControl"].update(s={"p": {"operations": ["x"], "resources": ["a?"]}}),
        "refuses the resource 'a?'",
    ),
    (lambda r: r["Manifests"][0]["Artifacts"][0].update(Uri="https://x/y"), "Uri must look like s3://"),
    (lambda r: r["Manifests"][0]["Artifacts"][0].update(Unarchive="TAR"), "Unarchive is NONE or ZIP"),
    (
        lambda r: r["Manifests"][0]["Artifacts"][0].update(Permission={"Read": "all"}),
        "Permission takes NONE, OWNER, ALL",
    ),
    (lambda r: r["Manifests"][0]["Artifacts"].append(r["Manifests"][0]["Artifacts"][0]), "is a second file named"),
    (lambda r: configuration(r).update(LONG="x" * RECIPE_BYTES), f"at most {RECIPE_BYTES} are taken"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILT, ids=[says for _, says in SPOILT])
def test_what_a_nucleus_rejects_is_found_and_nothing_else(recipe, spoil, says):
    assert lint(text(recipe)) == []
    bad = copy.deepcopy(recipe)
    spoil(bad)
    problems = lint(text(bad))
    assert any(says in problem for problem in problems), problems


@pytest.mark.parametrize("content", ["a: [", "- 1", "", "Manifests: [3]", "Manifests: [{Lifecycle: 3}]"])
def test_what_is_no_recipe_at_all_is_said_so(content):
    assert lint(content)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner, max_size=2),
    max_leaves=3,
)


@cache
def sound():
    """A recipe with nothing wrong."""
    with TemporaryDirectory() as folder:
        return rendered(Path(folder) / "out", only=("dispatcher",))[0].recipe


def places(node, path=()):
    """Every place of a tree."""
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


@given(st.data())
def test_the_linter_never_breaks_whatever_stands_where_something_else_should(data):
    tree = [yaml.safe_load(sound())]
    *above, last = data.draw(st.sampled_from([path for path in places(tree) if path]))
    node = tree
    for key in above:
        node = node[key]
    node[last] = data.draw(ANYTHING)
    assert isinstance(lint(yaml.safe_dump(tree[0], allow_unicode=True)), list)


@given(st.text(alphabet="ab{}:/$ ", max_size=30))
def test_a_script_passes_the_linter_just_if_the_strict_nucleus_can_expand_it(script):
    """The stand-in expands as lite does; `configuration` apart, since these have none."""
    from deploy.greengrass.build import Component

    component = Component(DEVICE, "1.0.0", "", {}, {})
    made = {"run": {"Script": f"exec {script}"}}
    recipe = {"Manifests": [{"Platform": {}, "Lifecycle": made}]}
    problems = [p for p in lint(yaml.safe_dump(recipe)) if "is no variable" in p or "has no default" in p]
    try:
        Nucleus(ROOT, "amd64").expand(component, script)
    except (ValueError, KeyError):
        assert problems
    else:
        assert not problems


# ---- merging ----

names = st.sampled_from(["a.b", "c.d", DEVICE, DISPATCHER])
specs = st.fixed_dictionaries(
    {"componentVersion": st.sampled_from(["1.0.0", "2.0.0"])},
    optional={
        "configurationUpdate": st.fixed_dictionaries(
            {"merge": st.dictionaries(st.sampled_from(["A", "B"]), st.text()).map(json.dumps)},
            optional={"reset": st.lists(st.sampled_from(["/A", "/B", "/C"]), unique=True)},
        ),
        "runWith": st.just({"posixUser": "ggc_user"}),
    },
)


@given(st.dictionaries(names, specs), st.dictionaries(st.sampled_from(["A", "B"]), st.text()))
def test_a_merge_keeps_strangers_to_the_letter_and_done_twice_it_is_nothing(had, merge):
    current = {"deploymentId": "d-1", "components": had, "deploymentStatus": "COMPLETED"} if had else None
    ours = {DEVICE: spec("2.0.0", had.get(DEVICE), Change(merge))}
    made = request("arn:aws:iot:r:1:thinggroup/g", current, ours, "ROLLBACK")
    assert made is not None
    assert {name: made["components"][name] for name in had if name != DEVICE} == {
        name: one for name, one in had.items() if name != DEVICE
    }
    then = {**made, "deploymentId": "d-2", "deploymentStatus": "ACTIVE"}
    again = {DEVICE: spec("2.0.0", made["components"][DEVICE], Change(merge))}
    assert request("arn:aws:iot:r:1:thinggroup/g", then, again, "ROLLBACK") is None
    failed = {**then, "deploymentStatus": "FAILED"}
    assert request("arn:aws:iot:r:1:thinggroup/g", failed, again, "ROLLBACK") is not None


def test_a_setting_is_laid_over_what_was_set_before_and_reset_takes_it_back():
    had = {"componentVersion": "1.0.0", "configurationUpdate": {"merge": '{"A": "1", "B": "2"}', "reset": ["/C"]}}
    made = spec("1.1.0", had, Change({"A": "9", "C": "3"}, ("B",)))
    assert json.loads(made["configurationUpdate"]["merge"]) == {"A": "9", "C": "3"}
    assert made["configurationUpdate"]["reset"] == ["/B"]
    assert spec("1.0.0", had, Change()) == had


def test_a_secret_is_not_put_where_the_cloud_shows_it():
    with pytest.raises(RecipeError, match="MODEL_KEY would be readable in the cloud") as caught:
        changes(["device.MODEL_KEY=hunter2"], [], {DEVICE: {"MODEL_KEY": "", "MODEL_KEY_FILE": ""}})
    assert "hunter2" not in str(caught.value)


def test_a_secret_in_the_stack_does_not_get_into_a_recipe(tmp_path):
    device = stack("device")
    secret = device.varied({"device": ("device", {"API_KEY": "hunter2"})})
    with pytest.raises(RecipeError, match="API_KEY would be readable in the cloud") as caught:
        render(secret, {"device": tier(tmp_path / "tier")}, Wheels(), NAMING, tmp_path / "out")
    assert "hunter2" not in str(caught.value)
    public = device.varied({"device": ("device", {"MODEL_PUBLIC_KEY": "/etc/sign.pub", "API_KEY": ""})})
    assert render(public, {"device": tmp_path / "tier"}, Wheels(), NAMING, tmp_path / "out")


# ---- wheels ----


@pytest.mark.slow
def test_our_own_wheel_has_the_same_bytes_each_time(tmp_path):
    copies = load(ROOT / "stack.yml", {}).copies
    try:
        first, second = (build_own(ROOT, copies, tmp_path / name) for name in ("a", "b"))
    except RecipeError as error:
        pytest.skip(f"no wheel can be built here: {error}")
    assert first.read_bytes() == second.read_bytes()


def test_a_lock_pins_each_wheel_by_its_hash(tmp_path):
    (tmp_path / "Flask_Cors-6.0.1-py2.py3-none-any.whl").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
    assert lock(tmp_path) == f"flask-cors==6.0.1 --hash=sha256:{digest}\n"
    with pytest.raises(RecipeError, match="holds no wheels"):
        lock(tmp_path / "nowhere")


def test_wheels_that_cannot_be_had_are_one_sentence(tmp_path):
    own = tmp_path / "edgecascade-0.1.0-py3-none-any.whl"
    own.write_bytes(b"no zip")
    gather = PipGather(own, ROOT / "constraints.txt", "3.11", tmp_path)
    with pytest.raises(
        RecipeError, match=r"the wheels of 'device' for aarch64 and Python 3\.11 cannot be gathered"
    ) as caught:
        gather("device", "aarch64", tmp_path / "wheels")
    assert "\n" not in str(caught.value)
