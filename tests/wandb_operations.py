"""GraphQL as the W&B test server speaks it: one function an operation, found by the operation's name."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from wandb_store import Artifact, Collection, Key, Run, Sweep, content_path, manifest_path, md5, node_id

if TYPE_CHECKING:
    from wandb_server import WandbServer

ENTITY = "tester"
ORGANIZATION = "test-organization"  # also the name of its entity, which registries belong to
FEATURES = (
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILES",
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILE_DOWNLOAD_HANDLER",
    "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE",
    "ARTIFACT_TAGS",
    "CLIENT_IDS",
    "LARGE_FILENAMES",
    "MARK_RUN_FILES_UPLOADED",
    "PROJECT_ARTIFACT_COLLECTION_MEMBERSHIP",
    "SWEEPS_QUERY_FILTERING",
    "TOTAL_COUNT_IN_FILE_CONNECTION",
    "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION",
)

Json = dict[str, Any]


def common_names(variables: Json) -> Json:
    """An operation's variables and those within `input`; entity, project and run by these names."""
    v = variables | variables.get("input", {})
    return v | {
        "entity": v.get("entity") or v.get("entityName") or ENTITY,
        "project": v.get("project") or v.get("projectName") or "uncategorized",
        "run": v.get("run") or v.get("runName") or v.get("name"),
    }


def run_key(v: Json) -> Key:
    return v["entity"], v["project"], v["run"]


# What the SDK is shown. Most of it answers more than was asked for: the SDK takes what it needs.


def fields(thing: object, names: str, **more: Any) -> Json:
    """Attributes under GraphQL's names (`job_type` is jobType), and more."""
    camel = {name: re.sub(r"_(\w)", lambda letter: letter[1].upper(), name) for name in names.split()}
    return {camel[name]: getattr(thing, name) for name in camel} | more


def nothing(names: str) -> Json:
    """Fields that the SDK wants to see, and that have no value here."""
    return dict.fromkeys(names.split())


def page(items: Iterable[Any], node: Callable[[Any], Json], v: Json) -> Json:
    """The part of a list that the variables ask for."""
    items, start = list(items), int(v.get("cursor") or 0)
    end = min(len(items), start + (v.get("perPage") or len(items)))
    return {
        "totalCount": len(items),
        "edges": [{"node": node(items[i]), "cursor": str(i + 1)} for i in range(start, end)],
        "pageInfo": {"endCursor": str(end), "hasNextPage": end < len(items)},
    }


def project_node(entity: str, project: str) -> Json:
    number = zlib.crc32(f"{entity}/{project}".encode())
    owner = {"id": node_id("Entity", entity), "name": entity}
    names = {"id": node_id("Project", entity, project), "name": project, "internalId": str(number)}
    return names | {"entity": owner, "readOnly": False}


def run_node(run: Run) -> Json:
    project = project_node(*run.key[:2])
    return nothing("description commit") | fields(
        run,
        "display_name state tags notes group job_type created_at",
        id=run.node_id,
        name=run.id,
        project=project,
        projectId=int(project["internalId"]),
        user={"name": ENTITY, "username": ENTITY},
        sweepName=run.sweep,
        readOnly=False,
        heartbeatAt=run.created_at,
        config=json.dumps(run.raw_config),
        summaryMetrics=json.dumps(run.summary),
        systemMetrics=json.dumps(run.events[-1] if run.events else {}),
        historyLineCount=len(run.history),
        historyKeys={"lastStep": run.history[-1]["_step"] if run.history else -1},
        __typename="Run",
    )


def file_node(server: WandbServer, path: str) -> Json:
    folder, name = server.folder(path)
    addresses = dict.fromkeys(["url", "directUrl"], server.storage_url(path))
    content = {"sizeBytes": len(folder[name]), "md5": md5(folder[name]), "digest": md5(folder[name])}
    place = {"id": node_id("File", path), "name": name, "storagePath": path}
    return nothing("mimetype updatedAt") | place | addresses | content


def collection_node(collection: Collection) -> Json:
    latest = collection.find("latest")
    return nothing("description updatedAt") | fields(
        collection,
        "id created_at",
        name=collection.key[2],
        project=project_node(*collection.key[:2]),
        type={"name": collection.type},
        tags={"edges": []},
        latestArtifact=latest and {"id": latest.id, "versionIndex": latest.version},
        __typename="ArtifactPortfolio" if collection.portfolio else "ArtifactSequence",
    )


def alias_nodes(collection: Collection, artifact: Artifact) -> list[Json]:
    aliases = collection.aliases_of(artifact)
    node = collection_node(collection)
    return [{"id": node_id("Alias", alias), "alias": alias, "artifactCollection": node} for alias in aliases]


def artifact_node(server: WandbServer, artifact: Artifact) -> Json:
    return nothing("commitHash updatedAt") | fields(
        artifact,
        "id description digest history_step created_at",
        artifactSequence=collection_node(artifact.home),
        versionIndex=artifact.version,
        artifactType={"name": artifact.home.type},
        metadata=json.dumps(artifact.metadata),
        ttlDurationSeconds=-2,
        ttlIsInherited=True,
        tags=[{"id": node_id("Tag", tag), "name": tag} for tag in artifact.tags],
        state="COMMITTED" if artifact.committed else "PENDING",
        size=sum(entry.get("size", 0) for entry in artifact.contents.values()),
        fileCount=len(artifact.contents),
        aliases=[node for home in server.collections.values() for node in alias_nodes(home, artifact)],
        currentManifest={"file": {"directUrl": server.storage_url(manifest_path(artifact))}},
        createdBy=artifact.logged_by and run_node(server.runs[artifact.logged_by]),
        usedBy=page(artifact.used_by, lambda key: run_node(server.runs[key]), {}),
    )


def membership_node(server: WandbServer, collection: Collection, artifact: Artifact) -> Json:
    return {
        "id": node_id("Membership", *collection.key, artifact.number),
        "versionIndex": collection.versions.index(artifact),
        "createdAt": artifact.created_at,
        "aliases": alias_nodes(collection, artifact),
        "artifactCollection": collection_node(collection),
        "artifact": artifact_node(server, artifact),
    }


def sweep_node(server: WandbServer, sweep: Sweep) -> Json:
    keys = [(*sweep.key[:2], id) for id in sweep.runs]
    runs = [server.runs[key] for key in keys if key in server.runs]
    return (
        nothing("description bestLoss controller scheduler")
        | fields(
            sweep,
            "state created_at",
            id=sweep.node_id,
            name=sweep.id,
            displayName=sweep.config.get("name"),
            method=sweep.config["method"],
            config=json.dumps(sweep.config),  # meant to be YAML, and JSON is YAML
            updatedAt=sweep.created_at,
            runCount=len(runs),
            runCountExpected=sweep.expected_runs,
            project=project_node(*sweep.key[:2]),
            runs=page(runs, run_node, {}),
        )
    )


Operation = Callable[["WandbServer", Json], Json]
OPERATIONS: dict[str, Operation] = {}


def answers(*names: str) -> Callable[[Operation], Operation]:
    """Marks the function that answers the operations of these names."""

    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


# Operations: who is there


@answers("ServerFeaturesQuery", "ServerInfo")
def server_info(server: WandbServer, v: Json) -> Json:
    return {"serverInfo": {"features": [{"name": name, "isEnabled": True} for name in FEATURES]}}


@answers("Viewer", "GetViewer", "GetDefaultEntity")
def viewer(server: WandbServer, v: Json) -> Json:
    names = dict.fromkeys(["name", "username", "entity"], ENTITY)
    lists = {"apiKeys": {"edges": []}, "teams": {"edges": []}}
    user = {"id": node_id("User", ENTITY), "flags": "{}", "admin": False}
    return {"viewer": nothing("email deletedAt") | user | names | lists}


@answers("FetchOrgInfoFromEntity", "OrganizationCoreWeaveOrganizationID", "XXHashDigestsEnabled")
def entity(server: WandbServer, v: Json) -> Json:
    organization = {"name": ORGANIZATION, "orgEntity": {"name": ORGANIZATION}}
    node = {"organization": organization | nothing("coreWeaveOrganizationId")}
    return {"entity": node | {"user": None, "xxhashDigestsEnabled": False}}


# Operations on runs


@answers("UpsertBucket")
def upsert_bucket(server: WandbServer, v: Json) -> Json:
    """A run says what it is; or the public API changes one, which it names by its node id."""
    key, count = run_key(v), len(server.runs)
    if v.get("id"):
        run = next(run for run in server.runs.values() if run.node_id == v["id"])
    else:
        run = server.runs.setdefault(key, Run(key, display_name=f"run-{count + 1}"))
        run.state = v.get("state") or "running"
    for name, value in {
        "display_name": v.get("displayName") or v.get("display_name"),
        "notes": v.get("notes"),
        "tags": v.get("tags"),
        "group": v.get("groupName"),
        "job_type": v.get("jobType"),
        "sweep": v.get("sweep"),
        "raw_config": json.loads(v.get("config") or "null"),
        "summary": json.loads(v.get("summaryMetrics") or "null"),
    }.items():
        if value is not None:
            setattr(run, name, value)
    return {"upsertBucket": {"bucket": run_node(run), "inserted": len(server.runs) > count}}


@answers("RunResumeStatus")
def run_resume_status(server: WandbServer, v: Json) -> Json:
    run = server.runs.get(run_key(v))
    if run is None:
        return {"model": None}
    bucket = run_node(run) | {
        "logLineCount": len(run.output),
        "eventsLineCount": len(run.events),
        "historyTail": json.dumps([json.dumps(line) for line in run.history[-1:]]),
        "eventsTail": json.dumps([json.dumps(line) for line in run.events[-1:]]),
        "wandbConfig": json.dumps(run.raw_config.get("_wandb", {}).get("value", {})),
    }
    return {"model": project_node(*run.key[:2]) | {"bucket": bucket}}


@answers("Run", "RunState", "RunHistoryKeys")
def find_run(server: WandbServer, v: Json) -> Json:
    run = server.runs.get(run_key(v))
    return {"project": {"run": run and run_node(run)}}


@answers("Runs")
def runs(server: WandbServer, v: Json) -> Json:
    place = (v["entity"], v["project"])
    if not server.has_project(*place):
        return {"project": None}
    filters, order = json.loads(v.get("filters") or "{}"), v.get("order") or "+created_at"
    found = [run for run in server.runs.values() if run.key[:2] == place and run.matches(filters)]
    path = order.lstrip("+-")
    if path != "created_at":  # which is the order they are in
        found = sorted((run for run in found if run.get(path) is not None), key=lambda run: run.get(path))
    if order.startswith("-"):
        found.reverse()
    return {"project": project_node(*place) | {"runCount": len(found), "runs": page(found, run_node, v)}}


@answers("RunFullHistory")
def run_full_history(server: WandbServer, v: Json) -> Json:
    run = server.runs[run_key(v)]
    lines = {"history": run.history[: v["samples"]], "events": run.events[: v["samples"]]}
    return {"project": {"run": {name: list(map(json.dumps, rows)) for name, rows in lines.items()}}}


@answers("RunSampledHistory")
def run_sampled_history(server: WandbServer, v: Json) -> Json:
    specs = [json.loads(spec) for spec in v["specs"]]
    sampled = [server.runs[run_key(v)].sampled(spec["keys"], spec.get("samples", 500)) for spec in specs]
    return {"project": {"run": {"sampledHistory": sampled}}}


@answers("RunParquetHistory")
def run_parquet_history(server: WandbServer, v: Json) -> Json:
    return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}


@answers("HistoryPage")
def history_page(server: WandbServer, v: Json) -> Json:
    rows = [row for row in server.runs[run_key(v)].history if v["minStep"] <= row["_step"] < v["maxStep"]]
    return {"project": {"run": {"history": list(map(json.dumps, rows[: v["pageSize"]]))}}}


@answers("CreateRunFiles")
def create_run_files(server: WandbServer, v: Json) -> Json:
    key = run_key(v)
    urls = {name: server.storage_url("/".join(["runs", *key, name])) for name in v["files"]}
    files = [{"name": name, "uploadUrl": url} for name, url in urls.items()]
    return {"createRunFiles": {"runID": server.runs[key].node_id, "uploadHeaders": [], "files": files}}


@answers("MarkRunFilesUploaded")
def mark_run_files_uploaded(server: WandbServer, v: Json) -> Json:
    return {"markRunFilesUploaded": {"success": True}}


@answers("RunFiles")
def run_files(server: WandbServer, v: Json) -> Json:
    run = server.runs[run_key(v)]
    like = re.escape(v.get("pattern") or "%").replace("%", ".*").replace("_", ".")
    names = [name for name in run.files if re.fullmatch(like, name) and name in (v["fileNames"] or run.files)]
    part = {"cursor": v.get("fileCursor"), "perPage": v.get("fileLimit")}
    files = page(names, lambda name: file_node(server, "/".join(["runs", *run.key, name])), part)
    node = run_node(run) | {"fileCount": len(names), "files": files}
    return {"project": project_node(*run.key[:2]) | {"run": node}}


@answers("NotifyScriptableRunAlert")
def alert(server: WandbServer, v: Json) -> Json:
    server.runs[run_key(v)].alerts.append({name: v[name] for name in ("title", "text", "severity")})
    return {"notifyScriptableRunAlert": {"success": True}}


# Operations on artifacts


@answers("ArtifactType")
def artifact_type(server: WandbServer, v: Json) -> Json:
    collection = server.collections.get((v["entity"], v["project"], v["name"].split(":")[0]))
    return {"project": {"artifact": collection and {"artifactType": {"name": collection.type}}}}


@answers("CreateArtifact")
def create_artifact(server: WandbServer, v: Json) -> Json:
    (name,) = v.get("artifactCollectionNames") or [v["artifactCollectionName"]]
    home = server.collection((v["entity"], v["project"], name), v["artifactTypeName"])
    home.client_id = home.client_id or v.get("sequenceClientID")
    artifact = server.create_artifact(
        home,
        v["digest"],
        client_id=v.get("clientID"),
        description=v.get("description"),
        metadata=json.loads(v.get("metadata") or "{}"),
        wanted_aliases=[alias["alias"] for alias in v.get("aliases") or []],
        logged_by=run_key(v) if v.get("runName") else None,
        history_step=v.get("historyStep"),
        tags=[tag["tagName"] for tag in v.get("tags") or []],
    )
    return {"createArtifact": {"artifact": artifact_node(server, artifact)}}


@answers("CreateArtifactManifest")
def create_artifact_manifest(server: WandbServer, v: Json) -> Json:
    if v["manifestType"] != "FULL":
        raise NotImplementedError(f"manifests of type {v['manifestType']}")
    url = server.storage_url(manifest_path(server.artifact(v["artifactID"])))
    file = {"id": v["artifactID"], "uploadUrl": url, "uploadHeaders": []}
    return {"createArtifactManifest": {"artifactManifest": {"id": v["artifactID"], "file": file}}}


@answers("CreateArtifactFiles")
def create_artifact_files(server: WandbServer, v: Json) -> Json:
    """Where to upload each file; nowhere, if its contents are here already."""

    def node(file: Json) -> Json:
        path = content_path(file["md5"])
        return {
            "storagePath": path,
            "uploadUrl": None if path in server.blobs else server.storage_url(path),
            "uploadHeaders": [f"Content-MD5:{file['md5']}"],
            "uploadMultipartUrls": None,
            "artifact": {"id": file["artifactID"]},
        }

    return {"createArtifactFiles": {"files": page(v["artifactFiles"], node, {})}}


@answers("CommitArtifact")
def commit_artifact(server: WandbServer, v: Json) -> Json:
    artifact = server.artifact(v["artifactID"])
    server.commit(artifact)
    return {"commitArtifact": {"artifact": artifact_node(server, artifact)}}


@answers("ClientIDMapping")
def client_id_mapping(server: WandbServer, v: Json) -> Json:
    owners = [*server.artifacts, *server.collections.values()]
    found = next((owner for owner in owners if owner.client_id == v["clientID"]), None)
    return {"clientIDMapping": found and {"serverID": found.id}}


@answers("ArtifactByID", "ArtifactManifest", "FetchArtifactManifest", "ArtifactUsedBy", "ArtifactCreatedBy")
def artifact_by_id(server: WandbServer, v: Json) -> Json:
    return {"artifact": artifact_node(server, server.artifact(v.get("id") or v["artifact_id"]))}


@answers("ArtifactMembershipByName")
def artifact_membership_by_name(server: WandbServer, v: Json) -> Json:
    name, _, alias = v["name"].partition(":")
    collection = server.collections.get((v["entity"], v["project"], name))
    artifact = collection and collection.find(alias or "latest")
    node = artifact and membership_node(server, collection, artifact)
    return {"project": {"artifactCollectionMembership": node}}


@answers("ProjectArtifacts")
def artifact_versions(server: WandbServer, v: Json) -> Json:
    """The newest first."""
    collection = server.collections[v["entity"], v["project"], v["collection"]]
    versions = page(collection.versions[::-1], lambda one: artifact_node(server, one), v)
    for edge in versions["edges"]:
        edge["version"] = f"v{edge['node']['versionIndex']}"
    node = collection_node(collection) | {"artifacts": versions}
    return {"project": {"artifactType": {"artifactCollection": node}}}


@answers("ArtifactMembershipFiles", "GetArtifactMembershipFileUrls")
def artifact_files(server: WandbServer, v: Json) -> Json:
    collection = server.collections[v["entity"], v["project"], v["collection"]]
    contents = collection.find(v["alias"]).contents

    def node(name: str) -> Json:
        """A reference is listed too: its address is where it points to."""
        entry = contents[name]
        if "ref" not in entry:
            return file_node(server, content_path(entry["digest"])) | {"name": name}
        size = {"sizeBytes": entry.get("size", 0), "digest": entry["digest"]}
        names = dict.fromkeys(["url", "directUrl", "storagePath"], entry["ref"])
        return nothing("mimetype updatedAt md5") | {"id": node_id("File", name), "name": name} | names | size

    files = page(v.get("fileNames") or contents, node, v)
    found = collection_node(collection) | {"artifactMembership": {"files": files}}
    return {"project": {"artifactCollection": found}}


@answers("UseArtifact")
def use_artifact(server: WandbServer, v: Json) -> Json:
    artifact = server.artifact(v["artifactID"])
    if run_key(v) not in artifact.used_by:
        artifact.used_by.append(run_key(v))
    return {"useArtifact": {"artifact": artifact_node(server, artifact)}}


@answers("RunOutputArtifacts")
def run_output_artifacts(server: WandbServer, v: Json) -> Json:
    found = [artifact for artifact in server.artifacts if artifact.logged_by == run_key(v)]
    return {"project": {"run": {"artifacts": page(found, lambda one: artifact_node(server, one), v)}}}


@answers("RunInputArtifacts")
def run_input_artifacts(server: WandbServer, v: Json) -> Json:
    found = [artifact for artifact in server.artifacts if run_key(v) in artifact.used_by]
    return {"project": {"run": {"artifacts": page(found, lambda one: artifact_node(server, one), v)}}}


@answers("UpdateArtifact")
def update_artifact(server: WandbServer, v: Json) -> Json:
    artifact = server.artifact(v["artifactID"])
    artifact.metadata = json.loads(v.get("metadata") or "null") or artifact.metadata
    artifact.description = v.get("description") or artifact.description
    removed = [tag["tagName"] for tag in v.get("tagsToDelete") or []]
    added = [tag["tagName"] for tag in v.get("tagsToAdd") or []]
    artifact.tags = [tag for tag in artifact.tags if tag not in removed] + added
    return {"updateArtifact": {"artifact": artifact_node(server, artifact)}}


@answers("AddAliases")
def add_aliases(server: WandbServer, v: Json) -> Json:
    for alias in v["aliases"]:
        key = (alias["entityName"], alias["projectName"], alias["artifactCollectionName"])
        server.collections[key].alias_owners[alias["alias"]] = server.artifact(v["artifactID"])
    return {"addAliases": {"success": True}}


@answers("DeleteAliases")
def delete_aliases(server: WandbServer, v: Json) -> Json:
    for alias in v["aliases"]:
        key = (alias["entityName"], alias["projectName"], alias["artifactCollectionName"])
        server.collections[key].alias_owners.pop(alias["alias"], None)
    return {"deleteAliases": {"success": True}}


@answers("LinkArtifact")
def link_artifact(server: WandbServer, v: Json) -> Json:
    artifact = server.artifact(v["artifactID"])
    key = (v["entity"], v["project"], v["artifactPortfolioName"])
    portfolio = server.collection(key, artifact.home.type, portfolio=True)
    portfolio.add(artifact, [alias["alias"] for alias in v.get("aliases") or []])
    membership = membership_node(server, portfolio, artifact)
    return {"linkArtifact": {"versionIndex": membership["versionIndex"], "artifactMembership": membership}}


# Operations on sweeps


@answers("UpsertSweep")
def upsert_sweep(server: WandbServer, v: Json) -> Json:
    found = (sweep for sweep in server.sweeps.values() if v.get("id") in (sweep.id, sweep.node_id))
    sweep = next(found, None) or server.create_sweep(v["entity"], v["project"], v["config"])
    sweep.state = v.get("state") or sweep.state
    return {"upsertSweep": {"sweep": sweep_node(server, sweep), "configValidationWarnings": []}}


@answers("GetSweep", "GetSweepState", "SweepWithRuns")
def find_sweep(server: WandbServer, v: Json) -> Json:
    sweep = server.sweeps.get((v["entity"], v["project"], v.get("sweep") or v["name"]))
    return {"project": {"sweep": sweep and sweep_node(server, sweep)}}


@answers("GetSweeps")
def sweeps(server: WandbServer, v: Json) -> Json:
    found = [sweep for sweep in server.sweeps.values() if sweep.key[:2] == (v["entity"], v["project"])]
    nodes = page(found, lambda sweep: sweep_node(server, sweep), v)
    return {"project": {"totalSweeps": len(found), "sweeps": nodes}}


@answers("CreateAgent")
def create_agent(server: WandbServer, v: Json) -> Json:
    server.agents.append(server.sweeps[v["entity"], v["project"], v["sweep"]])
    return {"createAgent": {"agent": {"id": str(len(server.agents) - 1)}}}


@answers("Heartbeat")
def heartbeat(server: WandbServer, v: Json) -> Json:
    """An agent is told to stop runs, to start the next one if it has none, or that there are no more."""
    sweep = server.agents[int(v["id"])]
    alive = [id for id, running in json.loads(v["runState"]).items() if running]
    known = [server.runs.get((*sweep.key[:2], id)) for id in alive]
    commands = [{"type": "stop", "run_id": run.id} for run in known if run is not None and run.stop_requested]
    if not alive and sweep.state != "PAUSED":
        next_run = sweep.next_run()
        sweep.state = "FINISHED" if next_run is None and sweep.state == "RUNNING" else sweep.state
        commands = [next_run or {"type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}
