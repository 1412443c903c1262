"""GraphQL as the W&B test server speaks it: one function an operation, found by the operation's name."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from wandb_store import NOW, Artifact, Collection, Key, Run, Sweep, content_path, manifest_path, md5, node_id

if TYPE_CHECKING:
    from wandb_server import WandbServer

ENTITY = "tester"
ORGANIZATION = "test-organization"  # also the name of its entity, which registries belong to
FEATURES = """
ARTIFACT_COLLECTION_MEMBERSHIP_FILES ARTIFACT_COLLECTION_MEMBERSHIP_FILE_DOWNLOAD_HANDLER ARTIFACT_TAGS
ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE CLIENT_IDS LARGE_FILENAMES
PROJECT_ARTIFACT_COLLECTION_MEMBERSHIP USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION
""".split()

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


def page(items: Iterable[Any], node: Callable[[Any], Json]) -> Json:
    """A list, all on one page."""
    edges = [{"node": node(item), "cursor": str(n)} for n, item in enumerate(items, 1)]
    end = {"endCursor": str(len(edges)), "hasNextPage": False}
    return {"totalCount": len(edges), "edges": edges, "pageInfo": end}


def project_node(entity: str, project: str) -> Json:
    number = zlib.crc32(f"{entity}/{project}".encode())
    owner = {"id": node_id("Entity", entity), "name": entity}
    names = {"id": node_id("Project", entity, project), "name": project, "internalId": str(number)}
    return names | {"entity": owner, "readOnly": False}


def run_node(run: Run) -> Json:
    project = project_node(*run.key[:2])
    return nothing("description commit") | fields(
        run,
        "display_name state tags notes group job_type",
        id=run.node_id,
        name=run.id,
        project=project,
        projectId=int(project["internalId"]),
        user={"name": ENTITY, "username": ENTITY},
        sweepName=run.sweep,
        readOnly=False,
        createdAt=NOW,
        heartbeatAt=NOW,
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
        "id",
        createdAt=NOW,
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
    return nothing("commitHash description historyStep updatedAt") | fields(
        artifact,
        "id digest",
        createdAt=NOW,
        artifactSequence=collection_node(artifact.home),
        versionIndex=artifact.version,
        artifactType={"name": artifact.home.type},
        metadata=json.dumps(artifact.metadata),
        ttlDurationSeconds=-2,
        ttlIsInherited=True,
        tags=[],
        state="COMMITTED" if artifact.committed else "PENDING",
        size=sum(entry.get("size", 0) for entry in artifact.contents.values()),
        fileCount=len(artifact.contents),
        aliases=[node for home in server.collections.values() for node in alias_nodes(home, artifact)],
        currentManifest={"file": {"directUrl": server.storage_url(manifest_path(artifact))}},
        createdBy=artifact.logged_by and run_node(server.runs[artifact.logged_by]),
        usedBy=page(artifact.used_by, lambda key: run_node(server.runs[key])),
    )


def membership_node(server: WandbServer, collection: Collection, artifact: Artifact) -> Json:
    return {
        "id": node_id("Membership", *collection.key, artifact.number),
        "versionIndex": collection.versions.index(artifact),
        "createdAt": NOW,
        "aliases": alias_nodes(collection, artifact),
        "artifactCollection": collection_node(collection),
        "artifact": artifact_node(server, artifact),
    }


def sweep_node(server: WandbServer, sweep: Sweep) -> Json:
    keys = [(*sweep.key[:2], id) for id in sweep.runs]
    runs = [server.runs[key] for key in keys if key in server.runs]
    return (
        nothing("description bestLoss controller scheduler displayName runCountExpected")
        | {
            "id": node_id("Sweep", *sweep.key),
            "name": sweep.id,
            "state": "RUNNING",
            "method": sweep.config["method"],
            "config": json.dumps(sweep.config),  # meant to be YAML, and JSON is YAML
            **dict.fromkeys(["createdAt", "updatedAt"], NOW),
            "runCount": len(runs),
            "project": project_node(*sweep.key[:2]),
            "runs": page(runs, run_node),
        }
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


@answers("ServerFeaturesQuery")
def server_info(server: WandbServer, v: Json) -> Json:
    return {"serverInfo": {"features": [{"name": name, "isEnabled": True} for name in FEATURES]}}


@answers("Viewer", "GetDefaultEntity")
def viewer(server: WandbServer, v: Json) -> Json:
    names = dict.fromkeys(["name", "username", "entity"], ENTITY)
    lists = {"apiKeys": {"edges": []}, "teams": {"edges": []}}
    user = {"id": node_id("User", ENTITY), "flags": "{}", "admin": False}
    return {"viewer": nothing("email deletedAt") | user | names | lists}


@answers("FetchOrgInfoFromEntity", "OrganizationCoreWeaveOrganizationID")
def entity(server: WandbServer, v: Json) -> Json:
    organization = {"name": ORGANIZATION, "orgEntity": {"name": ORGANIZATION}}
    node = {"organization": organization | nothing("coreWeaveOrganizationId")}
    return {"entity": node | {"user": None}}


# Operations on runs


@answers("UpsertBucket")
def upsert_bucket(server: WandbServer, v: Json) -> Json:
    """A run says what it is."""
    key, count = run_key(v), len(server.runs)
    run = server.runs.setdefault(key, Run(key, display_name=f"run-{count + 1}"))
    run.state = v.get("state") or "running"
    for name, value in {
        "display_name": v.get("displayName"),
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


@answers("Run")
def find_run(server: WandbServer, v: Json) -> Json:
    run = server.runs.get(run_key(v))
    return {"project": {"run": run and run_node(run)}}


@answers("Runs")
def runs(server: WandbServer, v: Json) -> Json:
    """The runs of a project with these values, the oldest first."""
    place, wanted = (v["entity"], v["project"]), json.loads(v.get("filters") or "{}")
    if not server.has_project(*place):
        return {"project": None}
    found = [run for run in server.runs.values() if run.key[:2] == place]
    found = [run for run in found if all(getattr(run, name) == value for name, value in wanted.items())]
    return {"project": project_node(*place) | {"runCount": len(found), "runs": page(found, run_node)}}


@answers("RunSampledHistory")
def run_sampled_history(server: WandbServer, v: Json) -> Json:
    """The rows that have all of the keys."""
    history = server.runs[run_key(v)].history
    keys = [json.loads(spec)["keys"] for spec in v["specs"]]
    sampled = [[{k: row[k] for k in names} for row in history if set(names) <= row.keys()] for names in keys]
    return {"project": {"run": {"sampledHistory": sampled}}}


@answers("CreateRunFiles")
def create_run_files(server: WandbServer, v: Json) -> Json:
    key = run_key(v)
    urls = {name: server.storage_url("/".join(["runs", *key, name])) for name in v["files"]}
    files = [{"name": name, "uploadUrl": url} for name, url in urls.items()]
    return {"createRunFiles": {"runID": server.runs[key].node_id, "uploadHeaders": [], "files": files}}


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
    artifact = server.create_artifact(
        home,
        v["digest"],
        client_id=v.get("clientID"),
        metadata=json.loads(v.get("metadata") or "{}"),
        wanted_aliases=[alias["alias"] for alias in v.get("aliases") or []],
        logged_by=run_key(v) if v.get("runName") else None,
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

    return {"createArtifactFiles": {"files": page(v["artifactFiles"], node)}}


@answers("CommitArtifact")
def commit_artifact(server: WandbServer, v: Json) -> Json:
    artifact = server.artifact(v["artifactID"])
    server.commit(artifact)
    return {"commitArtifact": {"artifact": artifact_node(server, artifact)}}


@answers("ArtifactByID", "FetchArtifactManifest")
def artifact_by_id(server: WandbServer, v: Json) -> Json:
    return {"artifact": artifact_node(server, server.artifact(v.get("id") or v["artifact_id"]))}


@answers("ArtifactMembershipByName")
def artifact_membership_by_name(server: WandbServer, v: Json) -> Json:
    name, _, alias = v["name"].partition(":")
    collection = server.collections.get((v["entity"], v["project"], name))
    artifact = collection and collection.find(alias or "latest")
    node = artifact and membership_node(server, collection, artifact)
    return {"project": {"artifactCollectionMembership": node}}


@answers("GetArtifactMembershipFileUrls")
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

    files = page(v.get("fileNames") or contents, node)
    found = collection_node(collection) | {"artifactMembership": {"files": files}}
    return {"project": {"artifactCollection": found}}


@answers("UseArtifact")
def use_artifact(server: WandbServer, v: Json) -> Json:
    artifact = server.artifact(v["artifactID"])
    if run_key(v) not in artifact.used_by:
        artifact.used_by.append(run_key(v))
    return {"useArtifact": {"artifact": artifact_node(server, artifact)}}


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
    sweep = server.create_sweep(v["entity"], v["project"], v["config"])
    return {"upsertSweep": {"sweep": sweep_node(server, sweep), "configValidationWarnings": []}}


@answers("SweepWithRuns")
def find_sweep(server: WandbServer, v: Json) -> Json:
    sweep = server.sweeps.get((v["entity"], v["project"], v.get("sweep") or v["name"]))
    return {"project": {"sweep": sweep and sweep_node(server, sweep)}}


@answers("CreateAgent")
def create_agent(server: WandbServer, v: Json) -> Json:
    server.agents.append(server.sweeps[v["entity"], v["project"], v["sweep"]])
    return {"createAgent": {"agent": {"id": str(len(server.agents) - 1)}}}


@answers("Heartbeat")
def heartbeat(server: WandbServer, v: Json) -> Json:
    """An agent without a run is told to start the next one."""
    is_idle = not any(json.loads(v["runState"]).values())
    commands = [server.agents[int(v["id"])].next_run()] if is_idle else []
    return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}
