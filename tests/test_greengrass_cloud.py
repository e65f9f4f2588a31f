"""Publish, deploy, update, go back: against an account on loopback that checks all by botocore's own model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

import edgecascade
from deploy.greengrass.build import read
from deploy.greengrass.cloud import Cloud, connect
from deploy.greengrass.publish import plan, publish
from tests.aws_fake import ACCOUNT, GROUP, REGION, Account, serving
from tests.greengrass_rigs import DEVICE, DISPATCHER, ROOT, rendered

BUCKET = "parts"
OTHER = {"aws.greengrass.Cli": {"componentVersion": "2.12.0"}}


# One for all tests: each new one reads the service models again, which takes most of a test's time.
NEW_SESSION, SESSION = boto3.Session, cache(boto3.Session)


@pytest.fixture
def account(monkeypatch):
    made = Account()
    with serving(made) as url:
        for key, value in {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "hunter2-canary",
            "AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_MAX_ATTEMPTS": "1",
        }.items():  # fmt: skip
            monkeypatch.setenv(key, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        monkeypatch.setattr("boto3.Session", SESSION)
        monkeypatch.setattr("deploy.greengrass.publish.POLL_S", 0.01)
        monkeypatch.setattr("deploy.greengrass.target.POLL_S", 0.01)
        monkeypatch.setattr("deploy.greengrass.cloud._ATTEMPTS", 1)
        yield made


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line: status, stdout, stderr."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["edgecascade", "greengrass", *map(str, words)])
        status = 0
        try:
            edgecascade.main()
        except SystemExit as ended:
            status = ended.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


@pytest.fixture
def first(tmp_path):
    rendered(tmp_path / "one")
    return tmp_path / "one"


@pytest.fixture
def second(tmp_path):
    rendered(tmp_path / "two", "1.1.0", "2")
    return tmp_path / "two"


def versions(account):
    return {name: spec["componentVersion"] for name, spec in account.deployments[-1]["components"].items()}


def one_sentence(said):
    assert said.count("\n") == 1, said
    assert said.startswith("edgecascade: ")
    assert "hunter2" not in said
    assert "Traceback" not in said
    return said


def test_publish_deploy_update_rollback(account, run, first, second):
    account.deployments.append(
        {
            "targetArn": GROUP,
            "deploymentId": "d-1",
            "revisionId": "1",
            "deploymentStatus": "COMPLETED",
            "creationTimestamp": 1_600_000_000,
            "deploymentName": "ours",
            "components": OTHER,
            "deploymentPolicies": {"failureHandlingPolicy": "DO_NOTHING"},
            "isLatestForTarget": True,
        }
    )
    assert run("publish", first, "--bucket", BUCKET)[0] == 0
    status, out, _ = run("deploy", first, "--target", GROUP, "--set", "dispatcher.EDGE_URL=https://store.example/edge")
    assert status == 0
    assert "2 of 2 core devices succeeded" in out
    made = account.deployments[-1]
    assert versions(account) == {**dict.fromkeys(OTHER, "2.12.0"), DEVICE: "1.0.0", DISPATCHER: "1.0.0"}
    assert made["deploymentPolicies"]["failureHandlingPolicy"] == "ROLLBACK"
    assert made["deploymentName"] == "ours"
    merge = made["components"][DISPATCHER]["configurationUpdate"]["merge"]
    assert json.loads(merge) == {"EDGE_URL": "https://store.example/edge"}

    # The update breaks on the devices: each says why, the status is not 0, and what was configured is kept.
    account.bad_versions[f"{DEVICE} 1.1.0"] = "RUN_ERROR"
    assert run("publish", second, "--bucket", BUCKET)[0] == 0
    status, out, _ = run("deploy", second, "--target", GROUP)
    assert status == 1
    assert "kiosk-1: FAILED (FAILED_ROLLBACK_COMPLETE) [DEPLOYMENT_FAILURE > " in out
    assert "RUN_ERROR]" in out
    assert "0 of 2 core devices succeeded, 2 failed" in out
    assert account.deployments[-1]["components"][DISPATCHER]["configurationUpdate"]["merge"] == merge
    status, out, _ = run("status", "--target", GROUP, "--json")
    assert status == 1
    assert {row["device"] for row in json.loads(out)["devices"]} == {"kiosk-1", "kiosk-2"}

    # Back to the revision before; the stranger's component was never touched.
    status, out, _ = run("deploy", second, "--target", GROUP, "--previous")
    assert status == 0
    assert account.deployments[-1]["components"] == made["components"]
    assert run("status", "--target", GROUP)[0] == 0


def test_run_twice_it_changes_nothing(account, run, first, tmp_path):
    run("publish", first, "--bucket", BUCKET)
    run("deploy", first, "--target", GROUP, "--set", "device.THREADS=2")
    before = list(account.writes)
    assert before.count("CreateComponentVersion") == 2
    assert before.count("CreateDeployment") == 1
    rendered(tmp_path / "again")  # rendered anew, elsewhere: the same bytes
    status, out, _ = run("publish", tmp_path / "again", "--bucket", BUCKET)
    assert status == 0
    assert all(line.startswith("keep ") for line in out.splitlines())
    for words in ([], ["--set", "device.THREADS=2"]):
        status, out, _ = run("deploy", first, "--target", GROUP, *words)
        assert status == 0
        assert "nothing to change" in out
    assert account.writes == before


def test_a_dry_run_writes_nothing_and_says_what_the_real_one_then_does(account, run, first):
    _, told, _ = run("publish", first, "--bucket", BUCKET, "--dry-run")
    assert account.writes == []
    _, done, _ = run("publish", first, "--bucket", BUCKET)
    assert done == told
    assert len(re.findall("^upload s3://", told, re.MULTILINE)) == 8  # 2 × 2 zips and a tier of 4 files
    assert len(re.findall(r"^create com\.example", told, re.MULTILINE)) == 2
    words = ("deploy", first, "--target", GROUP, "--set", "device.THREADS=2")
    writes = list(account.writes)
    _, told, _ = run(*words, "--dry-run")
    assert account.writes == writes
    _, done, _ = run(*words)
    assert done.startswith(told)
    assert f'add {DEVICE} 1.0.0, configuration {{"THREADS":"2"}}' in told


def test_what_did_not_change_is_sent_once(account, run, first, second):
    run("publish", first, "--bucket", BUCKET)
    _, out, _ = run("publish", second, "--bucket", BUCKET)
    lines = out.splitlines()
    assert sum(line.startswith("keep s3://") for line in lines) == 4  # the tier
    assert sum(line.startswith("upload s3://") for line in lines) == 4  # the code


def test_a_large_artifact_goes_in_parts_and_arrives_whole(account, run, tmp_path):
    built = rendered(tmp_path / "big", size_bytes=9 << 20, only=("dispatcher",))
    assert run("publish", tmp_path / "big", "--bucket", BUCKET)[0] == 0
    assert "CreateMultipartUpload" in account.log
    for component in built:
        for key, path in component.artifacts.items():
            assert account.buckets[BUCKET][key][0] == path.read_bytes()


def test_a_conflict_is_one_sentence_and_leaves_all_as_it_was(account, run, first, tmp_path):
    run("publish", first, "--bucket", BUCKET)
    run("deploy", first, "--target", GROUP)
    before, objects = list(account.writes), dict(account.buckets[BUCKET])
    rendered(tmp_path / "other", "1.0.0", "something else")
    status, out, err = run("publish", tmp_path / "other", "--bucket", BUCKET)
    assert (status, out) == (1, "")
    assert "1.0.0 is published with other content; render with a higher --version" in one_sentence(err)
    assert (account.writes, account.buckets[BUCKET]) == (before, objects)


def test_somebody_elses_equal_version_at_the_same_moment_is_no_conflict(account, first, monkeypatch):
    cloud = connect()
    steps = plan(read(first), cloud, BUCKET)
    publish(steps, cloud, lambda _: None, 5)
    for component in account.components.values():
        component["clientToken"] = "theirs"
    publish(steps, cloud, lambda _: None, 5)  # the create of the plan now meets theirs
    assert account.log.count("CreateComponentVersion") == 4


def test_a_version_that_is_still_being_made_is_waited_for_and_not_deployed(account, run, first):
    run("publish", first, "--bucket", BUCKET)
    for component in account.components.values():
        component["looked"] = -1
    status, _, err = run("deploy", first, "--target", GROUP)
    assert (status, "is still being made (REQUESTED)" in one_sentence(err)) == (1, True)
    status, _, err = run("publish", first, "--bucket", BUCKET, "--wait", 0)
    assert (status, "is still REQUESTED after 0 s; repeat the command" in one_sentence(err)) == (1, True)
    assert run("publish", first, "--bucket", BUCKET)[0] == 0
    assert run("deploy", first, "--target", GROUP)[0] == 0


def test_a_failed_component_is_one_sentence_and_nothing_is_deployed(account, run, first, second):
    run("publish", first, "--bucket", BUCKET)
    run("deploy", first, "--target", GROUP)
    account.failing.add(DEVICE)
    status, _, err = run("publish", second, "--bucket", BUCKET)
    assert status == 1
    assert "Device 1.1.0 is FAILED in the cloud: an artifact is unusable; no zip" in one_sentence(err)
    for words in (("publish", second, "--bucket", BUCKET), ("deploy", second, "--target", GROUP)):
        status, _, err = run(*words)
        assert status == 1
        one_sentence(err)
    assert len(account.deployments) == 1
    assert versions(account) == {DEVICE: "1.0.0", DISPATCHER: "1.0.0"}


@pytest.mark.parametrize("words", [("publish", "--bucket", BUCKET), ("deploy", "--target", GROUP)])
def test_expired_credentials_are_one_sentence(account, run, first, words):
    account.expired = True
    status, out, err = run(words[0], first, *words[1:])
    assert (status, out) == (1, "")
    assert "the credentials have expired (ExpiredToken" in one_sentence(err)
    assert account.writes == []


@pytest.mark.parametrize("operation", ["HeadBucket", "PutObject", "CreateComponentVersion", "DescribeComponent"])
def test_a_connection_lost_while_publishing_is_one_sentence_and_the_next_run_goes_on(account, run, first, operation):
    account.drop = operation
    status, _, err = run("publish", first, "--bucket", BUCKET)
    assert status == 1
    assert "AWS cannot be reached or hung up" in one_sentence(err)
    assert account.deployments == []
    account.drop = ""
    assert run("publish", first, "--bucket", BUCKET)[0] == 0
    assert account.writes.count("CreateComponentVersion") == 2


@pytest.mark.parametrize("done", [False, True])
def test_a_connection_lost_while_deploying_never_makes_two_deployments(account, run, first, done):
    """Lost before the deployment was made, or after it, before the answer came."""
    run("publish", first, "--bucket", BUCKET)
    account.drop, account.drop_after = "CreateDeployment", done
    status, _, err = run("deploy", first, "--target", GROUP)
    assert status == 1
    assert "AWS cannot be reached or hung up" in one_sentence(err)
    assert len(account.deployments) == done
    account.drop = ""
    assert run("deploy", first, "--target", GROUP)[0] == 0
    assert len(account.deployments) == 1


def test_no_connection_at_all_and_no_credentials_are_one_sentence(account, run, first, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    status, _, err = run("publish", first, "--bucket", BUCKET)
    assert (status, "AWS cannot be reached" in one_sentence(err)) == (1, True)
    monkeypatch.setattr("boto3.Session", NEW_SESSION)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    status, _, err = run("publish", first, "--bucket", BUCKET)
    assert (status, "there are no credentials" in one_sentence(err)) == (1, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "kiosks"], "must look like arn:aws:iot:REGION:ACCOUNT:thinggroup/NAME"),
        (["--target", GROUP.replace(REGION, "us-east-1")], "--target is in us-east-1"),
        (["--target", GROUP, "--set", "edge.THREADS=1"], "names no component that was rendered; there are"),
        (["--target", GROUP, "--set", "device.THREAD=1"], "has no setting 'THREAD'; it has API_KEY_FILE, BIND"),
        (["--target", GROUP, "--set", "device.THREADS"], "must look like COMPONENT.KEY=VALUE"),
        (["--target", GROUP, "--set", "device.THREADS={x}"], "the lite nucleus expands no '{'"),
        (["--target", GROUP, "--on-failure", "PANIC"], "known are ROLLBACK, DO_NOTHING"),
        (["--target", GROUP, "--previous"], "has no revision before this one"),
        (["--target", GROUP, "--previous", "--reset", "device.THREADS"], "leave --set and --reset out"),
        (["--target", GROUP], "is not published; publish it first"),
    ],
)
def test_a_wrong_word_is_one_sentence(account, run, first, words, says):
    status, _, err = run("deploy", first, *words)
    assert status == 1
    assert says in one_sentence(err)
    assert account.writes == []


def test_the_bucket_must_be_there_and_in_the_region(account, run, first):
    assert "name the bucket" in one_sentence(run("publish", first)[2])
    assert "looking for the bucket 'other' failed" in one_sentence(run("publish", first, "--bucket", "other")[2])


def test_an_object_that_we_did_not_send_is_not_taken_for_ours(account, run, first):
    run("publish", first, "--bucket", BUCKET)
    key = next(iter(account.buckets[BUCKET]))
    account.buckets[BUCKET][key] = (b"something else", {})
    account.components.clear()
    status, _, err = run("publish", first, "--bucket", BUCKET)
    assert (status, "is not what we sent there" in one_sentence(err)) == (1, True)


def test_a_device_that_never_connected_is_not_heard_and_no_failure(account, run, first):
    run("publish", first, "--bucket", BUCKET)
    thing = f"arn:aws:iot:{REGION}:{ACCOUNT}:thing/new"
    status, out, _ = run("deploy", first, "--target", thing, "--wait", 0)
    assert status == 0
    assert "new: NOT HEARD" in out
    assert "0 of 1 core devices succeeded, 0 failed, 1 not ended" in out


def test_the_fake_refuses_what_the_service_model_refuses(account):
    config = Config(parameter_validation=False, retries={"total_max_attempts": 1})
    client = boto3.client("greengrassv2", config=config)
    for arguments, says in (
        ({"targetArn": "kiosks"}, "does not match"),
        ({}, "lacks 'targetArn'"),
        ({"targetArn": GROUP, "clientToken": "a_b"}, "does not match"),
        ({"targetArn": GROUP, "clientToken": "a" * 65}, "more than 64"),
        ({"targetArn": GROUP, "components": {DEVICE: {}}}, "lacks 'componentVersion'"),
        ({"targetArn": GROUP, "components": {DEVICE: {"componentVersion": ""}}}, "less than 1"),
        ({"targetArn": GROUP, "deploymentPolicies": {"failureHandlingPolicy": "PANIC"}}, "not one of"),
    ):
        with pytest.raises(ClientError, match=says):
            client.create_deployment(**arguments)
    assert isinstance(connect(), Cloud)


def page_lines():
    """The page's commands, in their order."""
    text = (ROOT / "docs" / "greengrass.md").read_text("utf-8")
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            yield shlex.split(line, comments=True)


def test_the_commands_of_the_page_do_what_it_says(account, run, tmp_path, monkeypatch):
    """In their order. Rendering, which needs wheels, is the stand-in's here, and the page's own in the slow test."""
    account.buckets["my-components"] = {}
    monkeypatch.chdir(tmp_path)
    done = []
    for number, words in enumerate(page_lines()):
        if words[:2] != ["edgecascade", "greengrass"]:
            assert words[:2] == ["pip", "install"]
            continue
        if words[2] == "render":
            options = dict(zip(words[3::2], words[4::2], strict=True))
            rendered(tmp_path / options["--out"], options.get("--version", "0.1.0"), str(number))
            done.append(("render", 0))
            if "--version" in options:
                run("publish", options["--out"], "--bucket", "my-components")
            continue
        status, _, err = run(*words[2:])
        assert (status, err) == (0, ""), words
        done.append((words[2], status))
    assert [name for name, _ in done[:7]] == ["render", "lint", "publish", "publish", "deploy", "deploy", "status"]
    merges = [one["components"][DISPATCHER].get("configurationUpdate", {}) for one in account.deployments]
    assert json.loads(merges[1]["merge"]) == {"EDGE_URL": "https://store.example/function/edge"}
    assert account.deployments[2]["components"][DEVICE]["configurationUpdate"] == {"reset": ["/MODEL_KEY_FILE"]}
    assert account.deployments[3]["components"] == account.deployments[1]["components"]


@pytest.mark.parametrize("component", [DEVICE, DISPATCHER])
def test_the_greengrass_development_kit_builds_what_was_published(account, run, first, tmp_path, component):
    """`gdk component build` holds a recipe against the kit's schema of recipes and looks for its artifacts in S3."""
    gdk = shutil.which("gdk")
    if not gdk:
        pytest.skip(
            "gdk, the Greengrass Development Kit CLI, is not installed (it is not on PyPI: see docs/greengrass.md)"
        )
    run("publish", first, "--bucket", BUCKET)
    recipe = next(one["recipe"] for one in account.components.values() if one["name"] == component)
    project = tmp_path / "project"
    project.mkdir()
    (project / "recipe.yaml").write_bytes(recipe)
    settings = {
        "author": "tests", "version": "1.0.0", "build": {"build_system": "zip"},
        "publish": {"bucket": BUCKET, "region": REGION},
    }  # fmt: skip
    (project / "gdk-config.json").write_text(json.dumps({"component": {component: settings}, "gdk_version": "1.3.0"}))
    words, environment = [gdk, "component", "build"], dict(os.environ)
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "greengrass-build" / "recipes" / "recipe.yaml").is_file()
    (project / "recipe.yaml").write_bytes(
        recipe.replace(b"DependencyType: SOFT", b"DependencyType: LOOSE").replace(b"Unarchive: ZIP", b"Unarchive: TAR")
    )
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0  # it does look
