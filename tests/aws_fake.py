"""AWS on loopback, as far as `edgecascade greengrass` asks it: S3, STS and Greengrass v2 behind one port.

Every request is taken apart and checked by botocore's own service model (required members, types, patterns, enums,
least and greatest sizes), and so is every reply, so that neither our code nor this fake can drift from the API.
"""

from __future__ import annotations

# ruff: noqa: N803 - arguments are named as AWS names them
import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.etree import ElementTree as ET

import botocore.session
import yaml
from botocore.model import OperationModel, ServiceModel, Shape

ACCOUNT, REGION = "123456789012", "eu-west-1"
GROUP = f"arn:aws:iot:{REGION}:{ACCOUNT}:thinggroup/kiosks"
LOADER = botocore.session.get_session().get_component("data_loader")
GREENGRASS, S3 = (ServiceModel(LOADER.load_service_model(name, "service-2"), name) for name in ("greengrassv2", "s3"))
OPERATIONS = {
    GREENGRASS: (
        *("CreateComponentVersion", "DescribeComponent", "ListDeployments", "GetDeployment", "CreateDeployment"),
        *("ListCoreDevices", "ListEffectiveDeployments"),
    ),
    S3: ("HeadBucket", "HeadObject", "PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"),
}


class Fault(Exception):  # noqa: N818 - an answer
    """An error that AWS answers with."""

    def __init__(self, status: int, code: str, message: str, **members: str) -> None:
        super().__init__(message)
        self.status, self.code, self.members = status, code, {"message": message, **members}


# ---- the service model ----


def check(shape: Shape, value: Any, path: str) -> None:  # noqa: C901, PLR0912 - a case a type
    """Raise `Fault` where a value is not what the model says."""

    def refuse(reason: str) -> None:
        raise Fault(400, "ValidationException", f"{path or 'input'} {reason}")

    facts = shape.metadata
    if shape.type_name == "structure":
        if not isinstance(value, Mapping):
            refuse("must be a structure")
        for name in shape.required_members:
            if name not in value:
                refuse(f"lacks '{name}'")
        for name, member in value.items():
            if name not in shape.members:
                refuse(f"has no member '{name}'")
            check(shape.members[name], member, f"{path}.{name}")
    elif shape.type_name == "map":
        if not isinstance(value, Mapping):
            refuse("must be a map")
        for key, member in value.items():
            check(shape.key, key, f"{path} key")
            check(shape.value, member, f"{path}.{key}")
    elif shape.type_name == "list":
        if not isinstance(value, list):
            refuse("must be a list")
        for number, member in enumerate(value):
            check(shape.member, member, f"{path}[{number}]")
    elif shape.type_name in {"string", "blob"}:
        if not isinstance(value, str | bytes | datetime):
            refuse("must be text")
        if facts.get("enum") and value not in facts["enum"]:
            refuse(f"is '{value}', not one of {facts['enum']}")
        if facts.get("pattern") and not re.fullmatch(facts["pattern"], value):
            refuse(f"is '{value}', which does not match {facts['pattern']}")
    elif shape.type_name in {"integer", "long", "double", "float"}:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse("must be a number")
    elif shape.type_name == "boolean" and not isinstance(value, bool):
        refuse("must be true or false")
    size = value if isinstance(value, int | float) else len(value) if hasattr(value, "__len__") else 0
    if "min" in facts and size < facts["min"]:
        refuse(f"is less than {facts['min']}")
    if "max" in facts and size > facts["max"]:
        refuse(f"is more than {facts['max']}")


@dataclass(frozen=True)
class Call:
    """One request, as the model sees it."""

    operation: OperationModel
    arguments: dict[str, Any]


def route(method: str, target: str, headers: Mapping[str, str], body: bytes) -> Call:
    """Find the operation and take its members out of path, query, headers and body; all checked."""
    parts = urlsplit(target)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    found: list[tuple[int, OperationModel, re.Match[str]]] = []
    for service, names in OPERATIONS.items():
        for name in names:
            model = service.operation_model(name)
            path, _, wanted = model.http["requestUri"].partition("?")
            path = path.rstrip("/") if service is GREENGRASS else path.replace("/{Bucket}", "/{Bucket}")
            pattern = re.sub(
                r"\\\{(\w+)(\\\+)?\\\}", lambda m: f"(?P<{m[1]}>{'.+' if m[2] else '[^/]+'})", re.escape(path)
            )
            hit = re.fullmatch(pattern, parts.path)
            needed = set(dict(parse_qsl(wanted, keep_blank_values=True)))
            needed |= {
                m.serialization.get("name", n)
                for n, m in model.input_shape.members.items()
                if m.serialization.get("location") == "querystring" and n in model.input_shape.required_members
            }
            if hit and model.http["method"] == method and needed <= set(query):
                found.append((len(needed), model, hit))
    if not found:
        raise Fault(404, "UnknownOperationException", f"{method} {target} is no operation that this fake knows")
    _, model, hit = max(found, key=lambda one: one[0])
    arguments = _members(model, hit, query, headers, body)
    check(model.input_shape, arguments, "")
    return Call(model, arguments)


def _members(  # noqa: C901 - a case a place
    model: OperationModel, hit: re.Match[str], query: Mapping[str, str], headers: Mapping[str, str], body: bytes
) -> dict[str, Any]:
    shape, arguments = model.input_shape, {}
    payload = shape.serialization.get("payload")
    known = set()
    for name, member in shape.members.items():
        place, wire = member.serialization.get("location"), member.serialization.get("name", name)
        value: Any = None
        if place == "uri":
            value = unquote(hit[wire])
        elif place == "querystring":
            known.add(wire)
            value = query.get(wire)
        elif place == "header":
            value = headers.get(wire)
        elif place == "headers":
            found = {k[len(wire) :]: v for k, v in headers.items() if k.lower().startswith(wire.lower())}
            value = found or None
        elif name == payload and member.type_name == "blob":
            value = body
        if isinstance(value, str) and member.type_name in {"integer", "long"}:
            value = int(value)
        if value is not None and member.type_name != "timestamp":
            arguments[name] = value
    if payload is None and body and model.service_model is GREENGRASS:
        for name, value in json.loads(body).items():
            member = shape.members.get(name)
            blob = member is not None and member.type_name == "blob"
            arguments[name] = base64.b64decode(value, validate=True) if blob else value
    return arguments


# ---- the account ----


@dataclass
class Account:
    """What lies in the cloud, and how it misbehaves."""

    buckets: dict[str, dict[str, tuple[bytes, dict[str, str]]]] = field(default_factory=lambda: {"parts": {}})
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    deployments: list[dict[str, Any]] = field(default_factory=list)
    devices: list[str] = field(default_factory=lambda: ["kiosk-1", "kiosk-2"])
    bad_versions: dict[str, str] = field(default_factory=dict)  # component version → the component's own fault
    failing: set[str] = field(default_factory=set)  # component names whose making fails
    expired: bool = False
    drop: str = ""  # an operation at which the connection is lost
    drop_after: bool = False  # … once it was done
    page_size: int = 2
    log: list[str] = field(default_factory=list)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)

    WRITES = ("PutObject", "CreateMultipartUpload", "CreateComponentVersion", "CreateDeployment")

    @property
    def writes(self) -> list[str]:
        """The operations that changed something."""
        return [name for name in self.log if name in self.WRITES]

    def check_credentials(self) -> None:
        """Raise `Fault` if they have expired."""
        if self.expired:
            raise Fault(403, "ExpiredTokenException", "The security token included in the request is expired")

    def answer(self, call: Call) -> dict[str, Any]:
        """Do what was asked."""
        self.log.append(call.operation.name)
        does = getattr(self, re.sub(r"(?<!^)(?=[A-Z])", "_", call.operation.name).lower())
        return does(**call.arguments)

    # S3

    def head_bucket(self, Bucket: str, **_: Any) -> dict[str, Any]:
        if Bucket not in self.buckets:
            raise Fault(404, "404", "Not Found")
        return {"BucketRegion": REGION}

    def head_object(self, Bucket: str, Key: str, **_: Any) -> dict[str, Any]:
        if Key not in self.buckets.get(Bucket, {}):
            raise Fault(404, "404", "Not Found")
        content, metadata = self.buckets[Bucket][Key]
        return {"ContentLength": len(content), "Metadata": metadata}

    def put_object(
        self,
        Bucket: str,
        Key: str,
        Body: bytes = b"",
        Metadata: Any = None,
        **rest: Any,
    ) -> dict[str, Any]:
        if Bucket not in self.buckets:
            raise Fault(404, "NoSuchBucket", "The specified bucket does not exist")
        said = rest.get("ChecksumSHA256")
        if said and base64.b64decode(said) != hashlib.sha256(Body).digest():
            raise Fault(400, "BadDigest", "the checksum is another")
        self.buckets[Bucket][Key] = (Body, Metadata or {})
        return {"ETag": '"etag"'}

    def create_multipart_upload(self, Bucket: str, Key: str, Metadata: Any = None, **_: Any) -> dict[str, Any]:
        self.uploads[Key] = {}
        self.tokens[f"s3 {Key}"] = Metadata or {}
        return {"Bucket": Bucket, "Key": Key, "UploadId": "u1"}

    def upload_part(self, Key: str, PartNumber: int, Body: bytes, **_: Any) -> dict[str, Any]:
        self.uploads[Key][PartNumber] = Body
        return {"ETag": f'"{PartNumber}"'}

    def complete_multipart_upload(self, Bucket: str, Key: str, **_: Any) -> dict[str, Any]:
        parts = self.uploads.pop(Key)
        self.buckets[Bucket][Key] = (b"".join(parts[n] for n in sorted(parts)), self.tokens.pop(f"s3 {Key}"))
        return {"Bucket": Bucket, "Key": Key, "ETag": '"whole"'}

    # Greengrass

    def create_component_version(
        self,
        inlineRecipe: bytes,
        clientToken: str = "",
        tags: Any = None,
    ) -> dict[str, Any]:
        recipe = yaml.safe_load(inlineRecipe)
        if len(inlineRecipe) > 16_000:
            raise Fault(400, "ValidationException", "the recipe is too large")
        name, version = recipe["ComponentName"], recipe["ComponentVersion"]
        arn = f"arn:aws:greengrass:{REGION}:{ACCOUNT}:components:{name}:versions:{version}"
        if arn in self.components and self.components[arn]["clientToken"] != clientToken:
            raise Fault(409, "ConflictException", "it exists", resourceId=arn, resourceType="COMPONENT")
        for manifest in recipe["Manifests"]:
            for artifact in manifest["Artifacts"]:
                bucket, _, key = artifact["Uri"].removeprefix("s3://").partition("/")
                if key not in self.buckets.get(bucket, {}):
                    raise Fault(400, "ValidationException", f"the artifact {artifact['Uri']} cannot be read")
        self.components[arn] = {
            "name": name, "version": version, "tags": tags or {}, "looked": 0, "clientToken": clientToken,
            "recipe": inlineRecipe, "failed": name in self.failing,
        }  # fmt: skip
        return self._component(arn, "creating")

    def describe_component(self, arn: str) -> dict[str, Any]:
        if arn not in self.components:
            raise Fault(
                404, "ResourceNotFoundException", f"{arn} is not there", resourceId=arn, resourceType="COMPONENT"
            )
        self.components[arn]["looked"] += 1
        return self._component(arn, "telling")

    def _component(self, arn: str, doing: str) -> dict[str, Any]:
        """It is deployable, or fails, only when it is looked at a second time."""
        one = self.components[arn]
        ended = {"componentState": "DEPLOYABLE"}
        if one["failed"]:
            ended = {"componentState": "FAILED", "message": "an artifact is unusable", "errors": {"app.zip": "no zip"}}
        status = {"componentState": "REQUESTED"} if one["looked"] < 2 else ended
        told = {"arn": arn, "componentName": one["name"], "componentVersion": one["version"], "status": status}
        made = {"creationTimestamp": 1_700_000_000}
        return {**told, **made} if doing == "creating" else {**told, **made, "tags": one["tags"]}

    def list_deployments(
        self,
        targetArn: str = "",
        historyFilter: str = "LATEST_ONLY",
        nextToken: str = "0",
        **_: Any,
    ) -> dict[str, Any]:
        found = [one for one in self.deployments if one["targetArn"] == targetArn]
        found = found[-1:] if historyFilter == "LATEST_ONLY" else found
        keys = ("targetArn", "revisionId", "deploymentId", "deploymentName", "creationTimestamp", "deploymentStatus")
        rows = [{**{k: one[k] for k in keys if k in one}, "isLatestForTarget": one is found[-1]} for one in found]
        return self._page("deployments", rows, nextToken)

    def get_deployment(self, deploymentId: str) -> dict[str, Any]:
        for one in self.deployments:
            if one["deploymentId"] == deploymentId:
                return {key: value for key, value in one.items() if key != "clientToken"}
        raise Fault(404, "ResourceNotFoundException", "no such deployment", resourceId="d", resourceType="DEPLOYMENT")

    def create_deployment(self, **arguments: Any) -> dict[str, Any]:
        token = arguments.get("clientToken", "")
        if token in self.tokens:
            return self.tokens[token]
        for name, spec in arguments.get("components", {}).items():
            json.loads(spec.get("configurationUpdate", {}).get("merge", "{}"))
            arn = f"arn:aws:greengrass:{REGION}:{ACCOUNT}:components:{name}:versions:{spec['componentVersion']}"
            if not name.startswith("aws.") and arn not in self.components:
                raise Fault(
                    404, "ResourceNotFoundException", f"{arn} is not there", resourceId=arn, resourceType="COMPONENT"
                )
        number = str(len(self.deployments) + 1)
        self.deployments.append(
            {
                **arguments,
                "deploymentId": f"d-{number}",
                "revisionId": number,
                "deploymentStatus": "ACTIVE",
                "creationTimestamp": 1_700_000_000 + len(self.deployments),
                "isLatestForTarget": True,
            }
        )
        self.tokens[token] = {"deploymentId": f"d-{number}"}
        return self.tokens[token]

    def list_core_devices(self, thingGroupArn: str = "", nextToken: str = "0", **_: Any) -> dict[str, Any]:
        devices = self.devices if thingGroupArn == GROUP else []
        rows = [{"coreDeviceThingName": name, "status": "HEALTHY"} for name in devices]
        return self._page("coreDevices", rows, nextToken)

    def list_effective_deployments(self, coreDeviceThingName: str, nextToken: str = "0", **_: Any) -> dict[str, Any]:
        """A device that meets a bad version fails, rolls back if it is told to, and says why."""
        if coreDeviceThingName not in self.devices:
            raise Fault(404, "ResourceNotFoundException", "no such device", resourceId="x", resourceType="DEVICE")
        rows = [self._effective(one) for one in self.deployments]
        return self._page("effectiveDeployments", rows, nextToken)

    def _effective(self, one: Mapping[str, Any]) -> dict[str, Any]:
        times = {"creationTimestamp": one["creationTimestamp"], "modifiedTimestamp": one["creationTimestamp"]}
        told = {**times, "deploymentId": one["deploymentId"], "targetArn": one["targetArn"]}
        told["deploymentName"] = one.get("deploymentName", "")
        bad = [self.bad_versions[f"{n} {s['componentVersion']}"] for n, s in one["components"].items()
               if f"{n} {s['componentVersion']}" in self.bad_versions]  # fmt: skip
        if not bad:
            return {**told, "coreDeviceExecutionStatus": "SUCCEEDED"}
        rolled = one["deploymentPolicies"]["failureHandlingPolicy"] == "ROLLBACK"
        stack = ["DEPLOYMENT_FAILURE", "COMPONENT_UPDATE_ERROR", "COMPONENT_BROKEN", bad[0]]
        return {
            **told, "coreDeviceExecutionStatus": "FAILED", "reason": "FAILED_ROLLBACK_COMPLETE" if rolled else "FAILED",
            "statusDetails": {"errorStack": stack, "errorTypes": ["USER_COMPONENT_ERROR"]},
        }  # fmt: skip

    def _page(self, field: str, rows: list[Any], token: str) -> dict[str, Any]:
        start = int(token)
        end = start + self.page_size
        return {field: rows[start:end], **({"nextToken": str(end)} if end < len(rows) else {})}


# ---- the wire ----


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    account: Account
    lock: threading.Lock

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def handle_any(self) -> None:
        """Answer, refuse, or hang up."""
        body = self._body()
        name = ""
        try:
            self.account.check_credentials()
            if self.command == "POST" and self.path == "/":
                return self._send(200, _identity(), {"Content-Type": "text/xml"})
            call = route(self.command, self.path, self.headers, body)
            name = call.operation.name
            if self.account.drop == name and not self.account.drop_after:
                return self._hang_up()
            with self.lock:
                answer = self.account.answer(call)
            if self.account.drop == name:
                return self._hang_up()
            check(call.operation.output_shape, answer, "reply")
            self._reply(call.operation, answer)
        except Fault as fault:
            self._refuse(fault, name)
        return None

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked" or "aws-chunked" in self.headers.get(
            "Content-Encoding", ""
        ):
            return self._chunks()
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def _chunks(self) -> bytes:
        """An aws-chunked body: chunks, then trailers."""
        whole = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return whole

    def _reply(self, operation: OperationModel, answer: dict[str, Any]) -> None:
        headers = {}
        if operation.service_model is GREENGRASS:
            status = operation.http.get("responseCode", 200)
            return self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        root = ET.Element(operation.output_shape.name if operation.output_shape else "Result")
        for name, member in operation.output_shape.members.items():
            place, wire = member.serialization.get("location"), member.serialization.get("name", name)
            value = answer.get(name)
            if value is None:
                continue
            if place == "headers":
                headers |= {f"{wire}{key}": text for key, text in value.items()}
            elif place == "header":
                headers[wire] = str(value)
            else:
                ET.SubElement(root, wire).text = str(value)
        return self._send(200, ET.tostring(root) if len(root) else b"", headers)

    def _refuse(self, fault: Fault, operation: str) -> None:
        if self.path.startswith("/greengrass/"):
            body, kind = json.dumps(fault.members).encode(), "application/json"
        else:
            wrap = "ErrorResponse><Error" if self.path == "/" else "Error"
            close = "Error></ErrorResponse" if self.path == "/" else "Error"
            body = f"<{wrap}><Code>{fault.code}</Code><Message>{fault}</Message></{close}>".encode()
            kind = "text/xml"
        self._send(fault.status, body, {"Content-Type": kind, "x-amzn-ErrorType": fault.code})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _identity() -> bytes:
    space = "https://sts.amazonaws.com/doc/2011-06-15/"
    result = f"<Arn>arn:aws:iam::{ACCOUNT}:user/u</Arn><UserId>u</UserId><Account>{ACCOUNT}</Account>"
    wrapped = f"<GetCallerIdentityResult>{result}</GetCallerIdentityResult>"
    return f'<GetCallerIdentityResponse xmlns="{space}">{wrapped}</GetCallerIdentityResponse>'.encode()


@contextmanager
def serving(account: Account) -> Iterator[str]:
    """The account on a free port of loopback."""
    handler = type("Bound", (Handler,), {"account": account, "lock": threading.Lock()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
