"""AI: agents - what a model decided, what its tools did, and what of it survives a crash.

A language model is slow, costly, fallible and never answers the same twice. Seen from a workflow it is
one more activity: its answer is recorded, so a crash does not ask (and pay) again, and a replay decides
as it did at first. The six items ask what follows for calls, decisions, people, streams, frameworks and
tools, and what is left to whoever builds the agent.

The calls go through the ordinary client libraries. With OPENAI_API_KEY they reach the model that
OPENAI_BASE_URL and OPENAI_MODEL name. Without a key they reach a stand-in in a process of its own, which
also fails on request and counts its calls; no network is needed then, and nothing leaves this machine.
"""

from common import (
    Category,
    Evidence,
    Target,
    causes,
    cited,
    connect,
    control,
    holds,
    limit,
    native,
    side_by_side,
    works,
)
from lab import (
    Child,
    Lab,
    count_events,
    event_times,
    failed_tasks,
    history_of,
    keywords_in,
    make_worker,
    name_of,
    note,
    notes,
    run,
    sandbox,
    status_of,
    until,
)

import asyncio
import contextlib
import functools
import importlib
import json
import os
import re
import secrets
import signal
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temporalio import activity, workflow
from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowHistory,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception
from temporalio.service import RPCError
from temporalio.worker import Replayer

with workflow.unsafe.imports_passed_through():
    import openai
    import openai.resources.chat.completions  # or each worker process would import it with its first call
    from pydantic import BaseModel, PositiveInt, ValidationError
    from temporalio.contrib.workflow_streams import WorkflowStream, WorkflowStreamClient

if TYPE_CHECKING:
    from agents import Tool as AgentTool

AI = Category(
    "AI",
    "AI agent integration",
    "What of an agent survives a crash: its calls, its decisions, its people, its tools?",
)

# The agent frameworks report to their makers unless they are told not to. Worker processes inherit this.
if not workflow.unsafe.in_sandbox():
    os.environ.update(
        OPENAI_AGENTS_DISABLE_TRACING="1",
        LANGSMITH_TRACING="false",
        LANGCHAIN_TRACING_V2="false",
        OTEL_SDK_DISABLED="true",
    )

# A worker that was killed is missed after this long, here short, so that kills cost little time: by the
# workflow task it had, and by the activity whose heartbeats stop.
SOON = timedelta(seconds=2)
NOTICED = timedelta(seconds=4)
# A worker holds heartbeats back for 0.8 of their timeout, which leaves a busy machine little time for the
# next one to arrive, and loses what was not sent in a kill. These workers send them nearly at once.
PROMPT: dict[str, Any] = {"max_heartbeat_throttle_interval": timedelta(milliseconds=200)}
# Where nothing is to be given up, a slow machine gets all the time it needs.
PATIENT = timedelta(seconds=30)
RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=6)


# The stand-in for a paid model -----------------------------------------------------------------------
# It speaks the API of OpenAI (chat completions, plain and streamed, with tools and JSON schemas) and
# fails when the name of the model asks for it: "gpt@500:2" answers 500 to the first two calls, and so
# does "gpt@500:2/mine", which is counted apart. Every call goes into a ledger, which no worker and no
# Temporal server writes.

DEFAULT_MODEL = "gpt-4o-mini"
RETRY_AFTER = 2  # seconds that a 429 asks to wait
TOKEN_PAUSE = 0.025  # seconds between two streamed tokens


@dataclass(frozen=True)
class Call:
    """One call as the stand-in noted it."""

    model: str
    key: str
    prompt: str
    turn: int
    tokens: int
    at: float


async def serve_model(ledger: str, ready: str) -> None:
    """The whole life of the stand-in. It notes its port in `ready` as soon as it listens."""
    count: Counter[str] = Counter()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while await serve_call(reader, writer, ledger, count):
                pass

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=2**22)
    note(ready, str(server.sockets[0].getsockname()[1]))
    await server.serve_forever()


async def serve_call(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ledger: str, count: Counter[str]
) -> bool:
    """Answer one request, and say whether the connection may be used for another."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    pairs = (line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
    headers = {name.lower(): value for name, value in pairs}
    body = json.loads(await reader.readexactly(int(headers["content-length"])))
    count[body["model"]] += 1
    label = body["model"].partition("@")[2].partition("/")[0]
    fault, _, times = label.partition(":")
    if not times or count[body["model"]] > int(times):
        fault = ""
    message = reply_to(body, fault)
    usage = count_tokens(body["messages"], message)
    call = Call(
        model=body["model"],
        key=headers.get("idempotency-key", ""),
        prompt=str(body["messages"][-1].get("content")),
        turn=len(body["messages"]),
        tokens=usage["total_tokens"],
        at=time.time(),
    )
    note(ledger, json.dumps(asdict(call)))
    if fault == "drop":
        return False
    if fault == "slow":
        await asyncio.sleep(20)
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": int(time.time()), "model": body["model"]}
    if fault.isdigit():
        answer = json.dumps({"error": {"message": f"told to fail with {fault}"}})
        await send(writer, answer, status=int(fault))
    elif fault == "malformed":
        await send(writer, '{"choices": [')
    elif body.get("stream"):
        await stream(writer, whole, message["content"], stalls=fault == "stall")
    else:
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        await send(writer, json.dumps({**whole, "choices": [choice], "usage": usage}))
    return True


async def send(writer: asyncio.StreamWriter, body: str, status: int = 200) -> None:
    after = f"retry-after: {RETRY_AFTER}\r\n" if status == 429 else ""
    head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(body.encode())}\r\n{after}"
    writer.write(f"{head}\r\n{body}".encode())
    await writer.drain()


async def stream(writer: asyncio.StreamWriter, whole: dict[str, Any], text: str, stalls: bool) -> None:
    """Server-sent events, one token each."""
    writer.write(b"HTTP/1.1 200 -\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for number, token in enumerate([*re.findall(r"\S+\s*", text), ""]):
        choice = {"index": 0, "delta": {"content": token}, "finish_reason": None if token else "stop"}
        chunk = {**whole, "object": "chat.completion.chunk", "choices": [choice]}
        await send_chunk(writer, f"data: {json.dumps(chunk)}\n\n")
        await asyncio.sleep(20 if stalls and number == 20 else TOKEN_PAUSE)
    await send_chunk(writer, "data: [DONE]\n\n")
    await send_chunk(writer, "")


async def send_chunk(writer: asyncio.StreamWriter, data: str) -> None:
    writer.write(f"{len(data.encode()):x}\r\n{data}\r\n".encode())
    await writer.drain()


def reply_to(body: dict[str, Any], fault: str) -> dict[str, Any]:
    """A message that serves the prompt: it calls the tools that are offered, and then reports on them."""
    messages, tools = body["messages"], body.get("tools", [])
    prompt = next(str(one["content"]) for one in reversed(messages) if one["role"] == "user")
    results = [str(one["content"]) for one in messages if one["role"] == "tool"]
    left = tools[:1] if fault == "endless" else tools[len(results) :]
    if left:
        called = left if "at once" in prompt else left[:1]
        return {"role": "assistant", "content": None, "tool_calls": [tool_call(one, prompt) for one in called]}
    return {"role": "assistant", "content": text_for(body, prompt, results, fault)}


def text_for(body: dict[str, Any], prompt: str, results: list[str], fault: str) -> str:
    form, choice = body.get("response_format"), re.search(r"one of: ([\w, ]+)", prompt)
    span = re.search(r"from (\d+) to (\d+)", prompt)
    if form:
        filled = json.dumps(fill(form["json_schema"]["schema"], prompt))
        if fault == "invalid" or (fault == "mending" and "refused" not in prompt):
            return "I would say two mugs."
        return filled.replace("2", '"a few"') if fault == "mending" and "Invalid JSON" in prompt else filled
    if results:
        return f"Done: {'; '.join(results)}."
    if choice:
        return secrets.choice([str(option) for option in choice.group(1).split(", ")])
    if span:
        return " ".join(f"{number}," for number in range(int(span.group(1)), int(span.group(2)) + 1))
    return f"Here is my answer to: {prompt}"


def tool_call(tool: dict[str, Any], prompt: str) -> dict[str, Any]:
    arguments = json.dumps(fill(tool["function"]["parameters"], prompt))
    name = tool["function"]["name"]
    return {
        "id": f"call_{secrets.token_hex(4)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def fill(schema: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Values for a schema: a text is what stands 'in quotes' in the prompt, a number the first one there."""
    text, number = re.search(r"'([^']+)'", prompt), re.search(r"\d+", prompt)
    values = {"string": text.group(1) if text else "nothing", "integer": int(number.group()) if number else 0}
    return {name: values[one["type"]] for name, one in schema.get("properties", {}).items()}


def count_tokens(messages: list[dict[str, Any]], message: dict[str, Any]) -> dict[str, int]:
    asked, answered = len(json.dumps(messages).split()), len(json.dumps(message).split())
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


# What the items have in common: where the model answers, and one call of it -------------------------


@dataclass(frozen=True)
class Model:
    """Where a model answers, and its name. Not the key: arguments of workflows are kept in histories."""

    url: str
    name: str


@functools.cache
def model_client(url: str) -> openai.AsyncOpenAI:
    """The key comes from the worker's environment. Who retries is Temporal, so the client does not."""
    return openai.AsyncOpenAI(base_url=url, api_key=model_key(), max_retries=0, timeout=60)


def model_key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "the stand-in asks for none"


@dataclass(frozen=True)
class Endpoint:
    """The model that an item talks to. The stand-in also keeps a `ledger` of its calls, and can fail."""

    url: str
    name: str
    ledger: str | None = None

    @property
    def local(self) -> bool:
        return self.ledger is not None

    @property
    def model(self) -> Model:
        return Model(self.url, self.name)

    def named(self, label: str) -> Model:
        """The stand-in under another name, which tells its calls apart or asks for a fault."""
        return Model(self.url, f"{self.name}@{label}" if self.local else self.name)

    def calls(self, model: Model | None = None, keys: str = "") -> list[Call]:
        """The calls that the stand-in saw, of one model or with idempotency keys that begin so."""
        assert self.ledger, "a real model does not tell"
        seen = [Call(**json.loads(line)) for line in notes(self.ledger)]
        return [one for one in seen if one.key.startswith(keys) and (model is None or one.model == model.name)]


UNSEEN = "a real model is configured: this needs the faults and the call counter of the local stand-in"


@contextlib.asynccontextmanager
async def an_endpoint(lab: Lab) -> AsyncIterator[Endpoint]:
    """The user's model when there is a key for it, else the stand-in in a process of its own."""
    if os.environ.get("OPENAI_API_KEY"):
        url = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        yield Endpoint(url, os.environ.get("OPENAI_MODEL") or DEFAULT_MODEL)
        return
    ledger, ready = lab.file("model"), lab.file("model-port")
    async with lab.process(serve_model, ledger, ready):
        await until(lambda: notes(ready), "the stand-in for the model listens")
        yield Endpoint(f"http://127.0.0.1:{notes(ready)[0]}/v1", DEFAULT_MODEL, ledger)


@contextlib.asynccontextmanager
async def beating() -> AsyncIterator[None]:
    """Tell the server again and again that this activity is alive: one whose worker was killed is noticed soon."""

    async def beat() -> None:
        while True:
            activity.heartbeat()
            await asyncio.sleep(0.3)

    beats = asyncio.create_task(beat())
    try:
        yield
    finally:
        beats.cancel()


# AI-01 LLM call as activity --------------------------------------------------------------------------
# A model call is an activity like any other: answered once, remembered for good. What is yours is to
# say which errors a retry can mend.


@dataclass
class Question:
    model: Model
    text: str
    ledger: str
    seconds: float = 60  # until the client gives up waiting
    schema: dict[str, Any] | None = None  # the JSON that is wanted; None for plain text


@dataclass
class Answer:
    text: str
    tokens: int


@activity.defn
async def ask(question: Question) -> Answer:
    """One call of a model."""
    try:
        async with beating():
            return await complete(question)
    except openai.APIStatusError as error:
        # Not "from error": some endpoints quote the key in a refusal, and causes go into the history.
        raise for_temporal(error) from None


async def complete(question: Question) -> Answer:
    note(question.ledger, f"{question.model.name}: {question.text}")
    info = activity.info()
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": question.schema}}
    completion = await model_client(question.model.url).chat.completions.create(
        model=question.model.name,
        messages=[{"role": "user", "content": question.text}],
        response_format=form if question.schema else openai.omit,
        timeout=question.seconds,
        # The same in every attempt of this activity, and in no other one.
        extra_headers={"Idempotency-Key": f"{info.workflow_id}/{info.activity_id}"},
    )
    usage = completion.usage
    return Answer(completion.choices[0].message.content or "", usage.total_tokens if usage else 0)


HOPELESS = {400, 401, 403, 404, 422}  # the request is wrong, and will be the next time


def for_temporal(error: openai.APIStatusError) -> ApplicationError:
    """A refusal in the terms of a retry policy: whether to try again, and when."""
    after = error.response.headers.get("retry-after")
    return ApplicationError(
        f"the model refused with HTTP {error.status_code}",
        type=f"HTTP {error.status_code}",
        non_retryable=error.status_code in HOPELESS,
        next_retry_delay=timedelta(seconds=float(after)) if after else None,
    )


@activity.defn
async def ask_unmapped(question: Question) -> Answer:
    """The control: an exception is an exception, and worth a retry."""
    return await complete(question)


@dataclass
class Interview:
    model: Model
    texts: list[str]
    ledger: str
    released: int = 99  # so many questions may be asked at once; the others wait for the signal
    activity: str = "ask"
    seconds: float = 60  # until the client gives up waiting
    missed: float = 30  # seconds until a worker is taken for dead


@workflow.defn
class Interviewer:
    """Asks one question after the other."""

    def __init__(self) -> None:
        self.released = 0

    @workflow.run
    async def run(self, plan: Interview) -> list[Answer]:
        self.released = max(self.released, plan.released)
        answers: list[Answer] = []
        for number, text in enumerate(plan.texts):
            await workflow.wait_condition(lambda: number < self.released)  # noqa: B023
            answer = await workflow.execute_activity(
                plan.activity,
                Question(plan.model, text, plan.ledger, plan.seconds),
                result_type=Answer,
                start_to_close_timeout=PATIENT,
                heartbeat_timeout=timedelta(seconds=plan.missed),
                retry_policy=RETRY,
            )
            answers.append(answer)
        return answers

    @workflow.signal
    def release(self, questions: int) -> None:
        self.released = questions


@workflow.defn
class CallsModel:
    """The control: workflow code that calls the model itself."""

    @workflow.run
    async def run(self, url: str) -> str:
        body = {"model": "from-workflow-code", "messages": [{"role": "user", "content": "Hello?"}]}
        with urllib.request.urlopen(f"{url}/chat/completions", json.dumps(body).encode()) as response:
            return str(response.read())


QUESTIONS = ["Name a colour.", "Name an animal.", "Name a city."]


async def completed(handle: WorkflowHandle[Any, Any], activities: int) -> bool:
    return (await count_events(handle))["ACTIVITY_TASK_COMPLETED"] >= activities


async def kill_between_calls(lab: Lab, model: Endpoint) -> Evidence:
    ledger, queue = lab.file("between"), f"{lab.id}-between"
    plan = Interview(model.model, QUESTIONS, ledger, released=2)
    handle = await lab.client.start_workflow(
        Interviewer.run, plan, id=queue, task_queue=queue, task_timeout=SOON
    )  # fmt: skip
    async with lab.worker_process([Interviewer], [ask], task_queue=queue, **PROMPT) as worker:
        await until(lambda: completed(handle, 2), "two questions are answered")
        await worker.kill()
    async with lab.worker_process([Interviewer], [ask], task_queue=queue, **PROMPT):
        await handle.signal(Interviewer.release, 3)
        answers = await handle.result()
    asked = [line.partition(": ")[2] for line in notes(ledger)]
    tokens = [answer.tokens for answer in answers]
    seen = model.calls(keys=queue) if model.local else None
    right = seen is None or ([one.prompt for one in seen], [one.tokens for one in seen]) == (QUESTIONS, tokens)
    return works(
        "worker killed between two calls: each question was put to the model once, and its token count is kept",
        asked == QUESTIONS and right and all(answer.text for answer in answers) and min(tokens) > 0,
        f"SIGKILL after 2 of 3 answers; questions asked (ledger): {len(asked)}; calls the model saw: "
        f"{'not told' if seen is None else len(seen)}; tokens in the result: {tokens}",
    )


@dataclass(frozen=True)
class Trial:
    """How a faulty model was asked: the calls it saw, and what the workflow got."""

    fault: str
    calls: list[Call]
    result: str

    @property
    def gaps(self) -> list[float]:
        return [later.at - earlier.at for earlier, later in zip(self.calls, self.calls[1:], strict=False)]

    def __str__(self) -> str:
        gaps = f", gaps {', '.join(f'{gap:.1f} s' for gap in self.gaps)}" if self.gaps else ""
        return f"{self.fault}: {len(self.calls)} calls{gaps}, {self.result}"


async def try_fault(lab: Lab, model: Endpoint, fault: str, seconds: float = 60, activity: str = "ask") -> Trial:
    """Ask a model that fails so; a worker is there."""
    name = f"{lab.id}-{fault.replace(':', '-')}-{activity}"
    plan = Interview(model.named(fault), QUESTIONS[:1], lab.file("faults"), activity=activity, seconds=seconds)
    handle = await lab.client.start_workflow(Interviewer.run, plan, id=name, task_queue=lab.task_queue)
    try:
        answers = await handle.result()
        result = "answered" if answers[0].text else "an empty answer"
    except WorkflowFailureError as error:
        result = f"failed: {causes(error)[-1]}"
    return Trial(fault.partition(":")[0], model.calls(keys=f"{name}/"), result)


# What is wrong with the model -> how many calls it takes, and whether there is an answer in the end.
TRIALS = {
    "429:1": (2, True),
    "500:2": (3, True),
    "malformed:1": (2, True),
    "drop:1": (2, True),
    "slow:1": (2, True),
    "400:9": (1, False),
    "401:9": (1, False),
}


async def faults(lab: Lab, model: Endpoint) -> list[Evidence]:
    claims = (
        "429: the next call comes when Retry-After says, not before",
        "500, a malformed answer, a dropped connection and a slow answer are retried until there is an answer",
        "400 and 401 are not retried, and the workflow learns why",
        "every attempt of a call carries the same idempotency key, and every call one of its own",
    )
    vain = "an unmapped 400 is retried in vain, as often as the policy allows"
    if not model.local:
        return [*(holds(claim, None, UNSEEN) for claim in claims), control(vain, None, UNSEEN)]
    async with lab.worker_process([Interviewer], [ask, ask_unmapped], **PROMPT):
        trials = await asyncio.gather(
            # Only the slow one is to lose patience with the model.
            *(try_fault(lab, model, fault, 1 if fault == "slow:1" else 60) for fault in TRIALS),
            try_fault(lab, model, "400:9", activity="ask_unmapped"),
        )
    found = dict(zip(TRIALS, trials, strict=False))
    unmapped = trials[-1]
    limited, mended = found["429:1"], [found[one] for one in ("500:2", "malformed:1", "drop:1", "slow:1")]
    refused = [found["400:9"], found["401:9"]]
    asked = all((len(found[one].calls), found[one].result == "answered") == TRIALS[one] for one in TRIALS)
    keys = [{call.key for call in trial.calls} for trial in trials]
    return [
        holds(
            claims[0],
            len(limited.calls) == 2 and limited.result == "answered" and limited.gaps[0] >= RETRY_AFTER,
            f"Retry-After: {RETRY_AFTER} s; {limited}; without it, after a 500: {mended[0].gaps[0]:.1f} s",
        ),
        holds(claims[1], asked, "; ".join(map(str, mended))),
        holds(
            claims[2],
            all(len(one.calls) == 1 and f"HTTP {one.fault}" in one.result for one in refused),
            "; ".join(map(str, refused)),
        ),
        holds(
            claims[3],
            all(len(one) == 1 and "" not in one for one in keys) and len(set.union(*keys)) == len(keys),
            f"{sum(len(trial.calls) for trial in trials)} calls of {len(keys)} activities carried "
            f"{len(set.union(*keys))} keys (workflow id/activity id)",
        ),
        control(vain, len(unmapped.calls) == RETRY.maximum_attempts and "failed" in unmapped.result, str(unmapped)),
    ]


async def call_from_workflow(lab: Lab, model: Endpoint) -> Evidence:
    queue = f"{lab.id}-direct"
    url = model.url if model.local else "http://127.0.0.1:9"  # no call is to reach a paid model
    async with lab.worker_process([CallsModel], [], task_queue=queue, **PROMPT):
        # Only the first attempt of a workflow task tells the history why it failed: it must not time out.
        handle = await lab.client.start_workflow(CallsModel.run, url, id=queue, task_queue=queue, task_timeout=PATIENT)
        await until(lambda: failed_tasks(handle), "the workflow task failed")
        message = (await failed_tasks(handle))[0]
    arrived = len([one for one in model.calls() if one.model == "from-workflow-code"]) if model.local else 0
    return control(
        "a call made in workflow code is refused by the sandbox",
        "Cannot access urllib" in message and arrived == 0,
        f"{message[:120]}; calls that reached the model: {arrived}",
    )


async def kill_inside_call(lab: Lab, model: Endpoint) -> Evidence:
    claim = "a worker killed inside a call calls again: the model answers, and bills, twice"
    if not model.local:
        return limit(claim, None, UNSEEN)
    queue, slow = f"{lab.id}-inside", model.named("slow:1/inside")
    plan = Interview(slow, QUESTIONS[:1], lab.file("inside"), missed=NOTICED.total_seconds())
    handle = await lab.client.start_workflow(Interviewer.run, plan, id=queue, task_queue=queue)
    async with lab.worker_process([Interviewer], [ask], task_queue=queue, **PROMPT) as worker:
        await until(lambda: model.calls(keys=queue), "the model was called")
        await worker.kill()
    async with lab.worker_process([Interviewer], [ask], task_queue=queue, **PROMPT):
        await handle.result()
    calls = model.calls(keys=queue)
    return limit(
        claim,
        len(calls) > 1,
        f"calls for one question: {len(calls)}, with {len({one.key for one in calls})} idempotency key, which "
        "only helps where the provider heeds it",
    )


@AI.item("AI-01", "LLM call as activity", seconds=150)
async def call_as_activity(lab: Lab) -> AsyncIterator[Evidence]:
    """Workers die between and inside calls, and the model fails in seven ways; the model counts its calls."""
    async with an_endpoint(lab) as model:
        parts = (kill_between_calls, call_from_workflow, kill_inside_call, faults)
        async for evidence in side_by_side(*(part(lab, model) for part in parts)):
            yield evidence
    yield native(
        "remembering answers and retrying are the SDK's; telling hopeless errors from others is the user's",
        workflow.execute_activity,
        (workflow.execute_activity, "retry_policy"),
        (workflow.execute_activity, "heartbeat_timeout"),
        activity.heartbeat,
        (ApplicationError, "next_retry_delay"),
        (ApplicationError, "non_retryable"),
        adds=keywords_in([ask], "except"),
    )


# AI-02 Non-determinism -------------------------------------------------------------------------------
# A model may answer as it likes: what the workflow acts on is the answer in its history. Prompts are
# code, and change under running agents as code does.

OPTIONS = ["refund", "replace", "escalate"]
CHOICE = f"A customer's mug arrived broken. Answer with one word, one of: {', '.join(OPTIONS)}"


@dataclass
class Case:
    model: Model
    ledger: str  # what activities did
    decisions: str = ""  # what workflow code decided, each time it ran


@dataclass
class Deed:
    kind: str
    ledger: str


@activity.defn(name="refund")
async def refund(deed: Deed) -> str:
    return act(deed)


@activity.defn(name="replace")
async def replace(deed: Deed) -> str:
    return act(deed)


@activity.defn(name="escalate")
async def escalate(deed: Deed) -> str:
    return act(deed)


def act(deed: Deed) -> str:
    note(deed.ledger, f"{deed.kind} for {activity.info().workflow_id}")
    return deed.kind


async def follow(decision: str, case: Case) -> str:
    """Act on a decision. Noting it, which workflow code must never do, shows what a replay decides."""
    note(case.decisions, decision)
    deed = Deed(decision, case.ledger)
    done: str = await workflow.execute_activity(decision, deed, result_type=str, start_to_close_timeout=PATIENT)
    return done


@workflow.defn
class ModelDecides:
    @workflow.run
    async def run(self, case: Case) -> str:
        question = Question(case.model, CHOICE, case.ledger)
        answer = await workflow.execute_activity(ask, question, start_to_close_timeout=PATIENT, retry_policy=RETRY)
        decision = next((option for option in OPTIONS if option in answer.text.lower()), "escalate")
        return await follow(decision, case)


@workflow.defn(sandboxed=False)
class RawChance:
    """The control: the same branches on randomness of its own, which only works without the sandbox."""

    @workflow.run
    async def run(self, case: Case) -> str:
        return await follow(secrets.choice(OPTIONS), case)


CASES = 8


async def decide(lab: Lab, model: Endpoint, kind: type) -> list[tuple[WorkflowHistory, str]]:
    """Run some cases to their end. Returns the history of each, and where its decisions were noted."""
    queue = f"{lab.id}-{kind.__name__}"
    cases = [Case(model.named("choice"), lab.file(f"{queue}-acts"), lab.file(f"{queue}-{n}")) for n in range(CASES)]
    async with lab.worker_process([kind], [ask, refund, replace, escalate], task_queue=queue, **PROMPT):
        handles = [
            await lab.client.start_workflow(kind.__name__, case, id=f"{queue}-{n}", task_queue=queue)
            for n, case in enumerate(cases)
        ]
        await asyncio.gather(*(handle.result() for handle in handles))
    histories = [await handle.fetch_history() for handle in handles]
    return [(history, case.decisions) for history, case in zip(histories, cases, strict=True)]


async def replay(kind: type, histories: Sequence[WorkflowHistory]) -> list[BaseException | None]:
    """Replay histories against a workflow's code. Returns what is wrong with each, or None when it fits."""

    async def each() -> AsyncIterator[WorkflowHistory]:
        for history in histories:
            yield history

    replayer = Replayer(workflows=[kind], workflow_runner=sandbox())
    async with asyncio.timeout(60):
        found = await replayer.replay_workflows(each(), raise_on_replay_failure=False)
    return [found.replay_failures.get(history.run_id) for history in histories]


async def model_decides(lab: Lab, model: Endpoint) -> Evidence:
    decided = await decide(lab, model, ModelDecides)
    first = [notes(file) for _, file in decided]
    calls = len(model.calls(model.named("choice"))) if model.local else 0
    failures = await replay(ModelDecides, [history for history, _ in decided])
    later = [notes(file)[len(before) :] for (_, file), before in zip(decided, first, strict=True)]
    asked = len(model.calls(model.named("choice"))) if model.local else 0
    done = [line for line in notes(lab.file(f"{lab.id}-ModelDecides-acts")) if " for " in line]
    wanted = [f"{before[0]} for {lab.id}-ModelDecides-{n}" for n, before in enumerate(first)]
    kinds = Counter(before[0] for before in first)
    return works(
        "on replay the workflow decides as the model did at first, and the model is not called",
        not any(failures)
        and all(one == [before[0]] for one, before in zip(later, first, strict=True))
        and sorted(done) == sorted(wanted)
        and (not model.local or (calls == asked == CASES and len(kinds) > 1)),
        f"{CASES} runs of one prompt: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; replayed: "
        f"{sum(one == [before[0]] for one, before in zip(later, first, strict=True))} decided as before; "
        f"activities that acted: {len(done)}; calls to the model: "
        + (f"{calls} before, {asked} after the replays" if model.local else "not told"),
    )


async def raw_chance(lab: Lab, model: Endpoint) -> Evidence:
    """A replay that decides otherwise must be found out; one that happens to decide the same fits."""
    decided = await decide(lab, model, RawChance)
    failures = await replay(RawChance, [history for history, _ in decided])
    differ = found = 0
    for (_, file), failure in zip(decided, failures, strict=True):
        decisions = notes(file)
        differ += decisions[0] != decisions[-1]
        found += decisions[0] != decisions[-1] and isinstance(failure, workflow.NondeterminismError)
    return control(
        "a workflow that branches on raw randomness: a replay that decides otherwise is a NondeterminismError",
        differ > 0 and found == differ,
        f"{CASES} histories replayed: {differ} decided otherwise, {found} of them a NondeterminismError",
    )


OLD = "Be brief. Draft an answer."
NEW = "Be kind and thorough. Draft an answer."


@dataclass
class Drafts:
    old: Model
    new: Model
    ledger: str


async def draft(model: Model, prompt: str, plan: Drafts) -> str:
    question = Question(model, prompt, plan.ledger)
    answer = await workflow.execute_activity(ask, question, start_to_close_timeout=PATIENT, retry_policy=RETRY)
    return answer.text


class Revising:
    """Drafts, waits to be told, and drafts again."""

    def __init__(self) -> None:
        self.revise = False

    async def twice(self, plan: Drafts, prompt: str, model: Model) -> None:
        await draft(model, prompt, plan)
        await workflow.wait_condition(lambda: self.revise)
        await draft(model, f"{prompt} Once more.", plan)


@workflow.defn(name="Assistant")
class Assistant(Revising):
    @workflow.run
    async def run(self, plan: Drafts) -> None:
        await self.twice(plan, OLD, plan.old)

    @workflow.signal
    def once_more(self) -> None:
        self.revise = True


@workflow.defn(name="Assistant")
class AssistantPatched(Revising):
    """Who began with the old prompt and model keeps them; who begins now gets the new ones."""

    @workflow.run
    async def run(self, plan: Drafts) -> None:
        if workflow.patched("kind-prompt"):
            await self.twice(plan, NEW, plan.new)
        else:
            await self.twice(plan, OLD, plan.old)

    @workflow.signal
    def once_more(self) -> None:
        self.revise = True


@workflow.defn(name="Assistant")
class AssistantChanged(Revising):
    """The same change without the guard."""

    @workflow.run
    async def run(self, plan: Drafts) -> None:
        await self.twice(plan, NEW, plan.new)

    @workflow.signal
    def once_more(self) -> None:
        self.revise = True


async def change_prompt(lab: Lab, model: Endpoint, kind: type, name: str) -> tuple[list[str], list[str], list[str]]:
    """Deploy `kind` under a running Assistant. Returns its prompts, those of a new run, and failed tasks."""
    queue = f"{lab.id}-{name}"
    plans = [Drafts(model.named(f"old/{name}"), model.named(f"new/{name}"), lab.file(f"{name}-{n}")) for n in (1, 2)]
    running = await lab.client.start_workflow(
        Assistant.run, plans[0], id=f"{queue}-running", task_queue=queue, task_timeout=SOON
    )
    async with lab.worker_process([Assistant], [ask], task_queue=queue, **PROMPT):
        await until(lambda: completed(running, 1), "the first draft is there")
    async with lab.worker_process([kind], [ask], task_queue=queue, **PROMPT):
        later = await lab.client.start_workflow("Assistant", plans[1], id=f"{queue}-later", task_queue=queue)
        for handle in (running, later):
            await handle.signal("once_more")
            await handle.result()
    prompts = [[line.partition("@")[2] or line.partition(": ")[2] for line in notes(plan.ledger)] for plan in plans]
    return prompts[0], prompts[1], await failed_tasks(running)


def drafts_by(model: Endpoint, prompt: str, label: str, times: int = 2) -> list[str]:
    """What the ledger of an Assistant says when it drafted with this prompt and this model."""
    texts = [prompt, f"{prompt} Once more."][-times:]
    return [f"{label}: {text}" if model.local else text for text in texts]


async def prompt_guarded(lab: Lab, model: Endpoint) -> Evidence:
    running, later, failed = await change_prompt(lab, model, AssistantPatched, "guarded")
    return holds(
        "prompt and model changed under a running agent behind patched(): it ends as it began, new ones get the new",
        running == drafts_by(model, OLD, "old/guarded") and later == drafts_by(model, NEW, "new/guarded")
        and not failed,
        f"running agent: {' | '.join(running)}; new agent: {' | '.join(later)}; failed workflow tasks: {len(failed)}",
    )  # fmt: skip


async def prompt_unguarded(lab: Lab, model: Endpoint) -> Evidence:
    running, _, failed = await change_prompt(lab, model, AssistantChanged, "unguarded")
    mixed = drafts_by(model, OLD, "old/unguarded")[:1] + drafts_by(model, NEW, "new/unguarded", 1)
    return limit(
        "a prompt or model changed in the same activity goes unnoticed: one agent mixes both",
        running == mixed and not failed,
        f"one agent asked: {' | '.join(running)}; failed workflow tasks: {len(failed)}",
    )


class Ticket(BaseModel):
    product: str
    quantity: PositiveInt


@workflow.defn
class Extract:
    """A model's JSON is input from outside: it is validated, and refused with the reason."""

    @workflow.run
    async def run(self, model: Model, text: str, ledger: str) -> dict[str, Any]:
        prompt = text
        for _ in range(3):
            question = Question(model, prompt, ledger, schema=Ticket.model_json_schema())
            answer = await workflow.execute_activity(ask, question, start_to_close_timeout=PATIENT, retry_policy=RETRY)
            try:
                return Ticket.model_validate_json(answer.text).model_dump()
            except ValidationError as error:
                prompt = f"{text} Your last answer was refused: {error.errors()[0]['msg']}"
        raise ApplicationError("no valid answer in three tries", type="InvalidAnswer")


async def structured(lab: Lab, model: Endpoint) -> Evidence:
    claim = "a structured answer is validated by pydantic; an invalid one is asked for again with the error"
    if not model.local:
        return holds(claim, None, UNSEEN)
    mending, never, queue = model.named("mending:99"), model.named("invalid:99"), f"{lab.id}-structured"
    text, ledger = "I want 2 of the 'red mug'.", lab.file("structured")
    refused = ""
    async with lab.worker_process([Extract], [ask], task_queue=queue, **PROMPT):
        ticket = await lab.client.execute_workflow(
            Extract.run, args=[mending, text, ledger], id=f"{queue}-mending", task_queue=queue
        )
        try:
            await lab.client.execute_workflow(
                Extract.run, args=[never, text, ledger], id=f"{queue}-never", task_queue=queue
            )
        except WorkflowFailureError as error:
            refused = str(causes(error)[-1])
    prompts = list(dict.fromkeys(one.prompt.removeprefix(text).strip() for one in model.calls(mending)))
    return holds(
        claim,
        ticket == {"product": "red mug", "quantity": 2} and len(prompts) == 3 and prompts[0] == ""
        and "Invalid JSON" in prompts[1] and "valid integer" in prompts[2]
        and "InvalidAnswer" in refused and len(model.calls(never)) >= 3,
        f"{len(model.calls(mending))} calls, then {ticket}; said to it: {prompts[1][:60]!r}, {prompts[2][:90]!r}; "
        f"never valid: {len(model.calls(never))} calls, then {refused}",
    )  # fmt: skip


@AI.item("AI-02", "Non-determinism", seconds=150)
async def non_determinism(lab: Lab) -> AsyncIterator[Evidence]:
    """A model that answers at random decides; prompts, models and answers change under running agents."""
    async with an_endpoint(lab) as model:
        parts = (raw_chance, prompt_guarded, prompt_unguarded, structured, model_decides)
        async for evidence in side_by_side(*(part(lab, model) for part in parts)):
            yield evidence
    yield native(
        "recorded decisions and guarded changes are the SDK's; validating answers is the user's",
        workflow.execute_activity,
        workflow.patched,
        workflow.NondeterminismError,
        Replayer.replay_workflow,
        WorkflowHandle.fetch_history,
        adds=keywords_in([Extract], "except"),
    )


# AI-03 Human in the loop -----------------------------------------------------------------------------
# A person is the slowest tool of an agent. The workflow waits for days as for seconds, and refuses what
# it must before anything is written down.

APPROVERS = ("ana", "ben")


@dataclass
class Request:
    model: Model
    ledger: str
    patience: float = 3600  # seconds until it goes to someone else


@dataclass
class Decision:
    by: str
    approve: bool
    amount: int


@activity.defn
async def settle(ledger: str, outcome: str) -> str:
    note(ledger, f"{outcome} at {time.time()}")
    return outcome


@workflow.defn
class Approval:
    """Has a model draft a request, and pays when a person approves of it in time."""

    def __init__(self) -> None:
        self.decision: Decision | None = None

    @workflow.run
    async def run(self, request: Request) -> str:
        question = Question(request.model, "Draft a refund request of one sentence.", request.ledger)
        await workflow.execute_activity(ask, question, start_to_close_timeout=PATIENT, retry_policy=RETRY)
        try:
            await workflow.wait_condition(lambda: self.decision is not None, timeout=request.patience)
            outcome = self.outcome()
        except TimeoutError:
            outcome = "escalated"
        return await workflow.execute_activity(
            settle, args=[request.ledger, outcome], start_to_close_timeout=PATIENT
        )  # fmt: skip

    def outcome(self) -> str:
        assert self.decision
        return f"paid {self.decision.amount}" if self.decision.approve else "declined"

    @workflow.update
    async def decide(self, decision: Decision) -> str:
        self.decision = decision
        return f"{workflow.info().workflow_id}: {self.outcome()}, as {decision.by} said"

    @decide.validator
    def check(self, decision: Decision) -> None:
        """Runs before the update is accepted: what it refuses leaves no trace in the history."""
        if self.decision:
            raise ApplicationError(f"{self.decision.by} has decided already")
        if decision.by not in APPROVERS:
            raise ApplicationError(f"{decision.by} may not decide this")
        if decision.amount <= 0:
            raise ApplicationError("the amount must be positive")

    @workflow.signal
    def decide_later(self, decision: Decision) -> None:
        # A signal cannot refuse: whoever sent it is gone. It can only be ignored.
        if decision.by in APPROVERS and self.decision is None:
            self.decision = decision


YES = Decision("ana", True, 20)


async def waiting(handle: WorkflowHandle[Any, Any]) -> bool:
    """The draft is there, and the workflow task that heard of it is done: it waits for a person."""
    count = await count_events(handle)
    return count["TIMER_STARTED"] == 1


def settled(ledger: str) -> list[str]:
    """What was really done in the end."""
    return [line.partition(" at ")[0] for line in notes(ledger) if " at " in line]


async def refused(handle: WorkflowHandle[Any, Any], decision: Decision) -> str:
    """Why an update is refused; empty when it is not."""
    try:
        await handle.execute_update(Approval.decide, decision)
    except WorkflowUpdateFailedError as error:
        return str(error.cause)
    return ""


async def by_update(lab: Lab, model: Endpoint) -> Evidence:
    queue, ledger = f"{lab.id}-update", lab.file("update")
    bad = [Decision("mallory", True, 20), Decision("ana", True, -5)]
    # Nothing but the decision is to be written, so the workflow stays open: a second worker pays later.
    async with lab.worker_process([Approval], [ask], task_queue=queue, **PROMPT) as worker:
        handle = await lab.client.start_workflow(Approval.run, Request(model.model, ledger), id=queue, task_queue=queue)
        await until(lambda: waiting(handle), "the request waits for a person")
        before = len(await history_of(handle))
        reasons = [await refused(handle, one) for one in bad]
        added = (await history_of(handle))[before:]
        answer = await handle.execute_update(Approval.decide, YES)
        before = len(await history_of(handle))
        reasons.append(await refused(handle, Decision("ben", False, 1)))
        added += (await history_of(handle))[before:]
        await worker.kill()
    async with lab.worker_process([Approval], [ask, settle], task_queue=queue, **PROMPT):
        result = await handle.result()
    updates = (await count_events(handle))["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"]
    # On a busy machine the workflow task that asked the validator may be kept; what was refused never is.
    traces = [one for one in added if not one["eventType"].startswith("EVENT_TYPE_WORKFLOW_TASK_")]
    return works(
        "approved by update; its validator refuses unauthorised, bad and repeated ones, which leave no trace",
        all(reasons) and not traces and updates == 1 and answer.endswith("paid 20, as ana said")
        and result == "paid 20" and settled(ledger) == ["paid 20"],
        f"refused: {'; '.join(reasons)}; events that tell of them: {len(traces)} "
        f"(beside {len(added) - len(traces)} of the workflow tasks that asked); "
        f"then {answer!r}; updates in the history: {updates}; done: {settled(ledger)}",
    )  # fmt: skip


async def by_signal(lab: Lab, model: Endpoint) -> Evidence:
    queue, ledger = f"{lab.id}-signal", lab.file("signal")
    async with lab.worker_process([Approval], [ask, settle], task_queue=queue, **PROMPT):
        handle = await lab.client.start_workflow(Approval.run, Request(model.model, ledger), id=queue, task_queue=queue)
        await until(lambda: waiting(handle), "the request waits for a person")
        await handle.signal(Approval.decide_later, Decision("mallory", True, 500))
        await handle.signal(Approval.decide_later, Decision("ben", False, 20))
        result = await handle.result()
    return works(
        "decided by signal; an unauthorised one has no effect",
        result == "declined" and settled(ledger) == ["declined"],
        f"mallory approves 500, ben declines: {result}; done: {settled(ledger)}",
    )


async def while_all_is_down(lab: Lab, model: Endpoint) -> list[Evidence]:
    """Two requests wait; worker and server are killed, and one of the two expires before they are back."""
    patient, hasty, queue = lab.file("patient"), lab.file("hasty"), f"{lab.id}-down"
    requests = (Request(model.model, patient), Request(model.model, hasty, patience=4))
    async with lab.private_server(file=True) as server:
        handles = [
            await server.client.start_workflow(
                Approval.run, request, id=f"{queue}-{request.patience}", task_queue=queue, task_timeout=SOON
            )
            for request in requests
        ]
        async with lab.worker_process([Approval], [ask, settle], server=server, task_queue=queue, **PROMPT) as worker:
            for handle in handles:
                await until(lambda: waiting(handle), "the request waits for a person", every=0.02)  # noqa: B023
            begun = time.time()
            await worker.kill()
        server.kill()
        early = settled(hasty)
        await asyncio.sleep(begun + 4.5 - time.time())  # time is the subject: it runs out while all is down
        await server.start()
        back = time.time()
        async with lab.worker_process([Approval], [ask, settle], server=server, task_queue=queue, **PROMPT):
            escalated = await handles[1].result()
            answer = await handles[0].execute_update(Approval.decide, YES, id="ana-1")
            again = await handles[0].execute_update(Approval.decide, Decision("ben", False, 9), id="ana-1")
            result = await handles[0].result()
    at = float(notes(hasty)[-1].partition(" at ")[2])
    asked = [len([line for line in notes(file) if "Draft" in line]) for file in (patient, hasty)]
    return [
        holds(
            "waits over SIGKILL of worker and server: the decision then counts, and nothing was asked again",
            result == "paid 20" and settled(patient) == ["paid 20"] and asked == [1, 1],
            f"both down for {back - begun:.1f} s; then {answer!r}; done: {settled(patient)}; drafts asked: {asked}",
        ),
        holds(
            "a request whose time ran out while all was down is escalated when it is up again",
            escalated == "escalated" and settled(hasty) == ["escalated"] and not early and at > back,
            f"its 4 s ran out while server and worker were down; escalated {at - back:.1f} s after the server was back",
        ),
        holds(
            "an update sent again under its id gives the recorded answer, whatever it says now",
            answer == again and answer.endswith("paid 20, as ana said") and settled(patient) == ["paid 20"],
            f"update ana-1: {answer!r}; again, now with ben declining: {again!r}; done: {settled(patient)}",
        ),
    ]


async def expires(lab: Lab, model: Endpoint) -> Evidence:
    queue, ledger = f"{lab.id}-expires", lab.file("expires")
    async with lab.worker_process([Approval], [ask, settle], task_queue=queue, **PROMPT):
        request = Request(model.model, ledger, patience=1)
        handle = await lab.client.start_workflow(Approval.run, request, id=queue, task_queue=queue)
        result = await handle.result()
    events = await history_of(handle)
    waited = event_times(events, "TIMER_FIRED")[0] - event_times(events, "TIMER_STARTED")[0]
    return holds(
        "nobody decides: it is escalated, not before the time is over",
        result == "escalated" and settled(ledger) == ["escalated"] and waited.total_seconds() >= 1,
        f"patience 1 s; escalated after {waited.total_seconds():.2f} s; done: {settled(ledger)}",
    )


async def plain_approval(ledger: str, inbox: str) -> None:
    """The control: a program that waits for input keeps what it waits for in its memory."""
    waiting = secrets.token_hex(4)
    note(ledger, f"waiting {waiting}")
    while not notes(inbox):
        await asyncio.sleep(0.02)
    known = notes(inbox)[0] == waiting
    note(ledger, "paid" if known else "no such request")


async def plain_process(lab: Lab, model: Endpoint) -> Evidence:
    ledger, inbox = lab.file("plain"), lab.file("inbox")
    async with lab.process(plain_approval, ledger, inbox) as program:
        await until(lambda: notes(ledger), "the program waits")
        await program.kill()
    async with lab.process(plain_approval, ledger, inbox) as program:
        await until(lambda: len(notes(ledger)) == 2, "the program waits again")
        note(inbox, notes(ledger)[0].removeprefix("waiting "))  # the person approves what they were shown
        await program.wait()
    return control(
        "a plain program that waits for input has lost the request after a kill",
        notes(ledger)[-1] == "no such request" and len(notes(ledger)) == 3,
        f"shown to a person, SIGKILL, restart, approved: {notes(ledger)[-1]!r}",
    )


async def timed_out_client(lab: Lab, model: Endpoint) -> list[Evidence]:
    """The update is sent while no worker runs, and its sender loses patience."""
    queue, ledger = f"{lab.id}-late", lab.file("late")
    async with lab.worker_process([Approval], [ask, settle], task_queue=queue, **PROMPT):
        handle = await lab.client.start_workflow(Approval.run, Request(model.model, ledger), id=queue, task_queue=queue)
        await until(lambda: waiting(handle), "the request waits for a person")
    told = "an answer"
    try:
        async with asyncio.timeout(2):
            await handle.execute_update(Approval.decide, YES, id="ana-1")
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
        told = type(error).__name__
    async with lab.worker_process([Approval], [ask, settle], task_queue=queue, **PROMPT):
        result = await handle.result()
        again = await handle.execute_update(Approval.decide, YES, id="ana-1")
    return [
        limit(
            "whoever sends an update and times out does not know that it will still be applied",
            told != "an answer" and result == "paid 20" and settled(ledger) == ["paid 20"],
            f"no worker: the client got {told} after 2 s; once a worker was there: {result}",
        ),
        holds(
            "sent again with the same update id, it gives the answer that was missed, and is applied once",
            again.endswith("paid 20, as ana said") and settled(ledger) == ["paid 20"],
            f"{again!r}; done: {settled(ledger)}",
        ),
    ]


@AI.item("AI-03", "Human in the loop", seconds=150)
async def human_in_the_loop(lab: Lab) -> AsyncIterator[Evidence]:
    """People approve, refuse, come too late and are not allowed to; workers and servers die meanwhile."""
    async with an_endpoint(lab) as model:
        parts = (while_all_is_down, timed_out_client, plain_process, by_update, by_signal, expires)
        async for evidence in side_by_side(*(part(lab, model) for part in parts)):
            yield evidence
    yield native(
        "waiting, refusing and expiring are the SDK's",
        workflow.update,
        workflow.signal,
        (workflow.wait_condition, "timeout"),
        WorkflowHandle.signal,
        (WorkflowHandle.execute_update, "id"),
        WorkflowUpdateFailedError,
        WorkflowUpdateRPCTimeoutOrCancelledError,
    )


# AI-04 Streaming -------------------------------------------------------------------------------------
# A stream through the workflow is a preview of the answer, kept for whoever comes late. The answer itself
# is what the activity returns.

COUNTING = "Count from 1 to 40, in digits, with a comma behind each number. Write nothing else."


@dataclass
class Piece:
    attempt: int
    index: int  # of the token, from 0; -1 begins the answer anew: forget what came before
    text: str
    sent: float


@activity.defn
async def answer_in_pieces(question: Question) -> str:
    """Publishes each token as it comes, and returns the whole."""
    attempt = activity.info().attempt
    stream = WorkflowStreamClient.from_within_activity(batch_interval=timedelta(milliseconds=50))
    pieces = stream.topic("answer", type=Piece)
    tokens: list[str] = []
    async with beating(), stream:
        pieces.publish(Piece(attempt, -1, "", time.time()))
        async for token in tokens_of(question):
            pieces.publish(Piece(attempt, len(tokens), token, time.time()))
            tokens.append(token)
    note(question.ledger, json.dumps("".join(tokens)))
    return "".join(tokens)


async def tokens_of(question: Question) -> AsyncIterator[str]:
    """The tokens of a model's answer, one at a time."""
    chunks = await model_client(question.model.url).chat.completions.create(
        model=question.model.name, messages=[{"role": "user", "content": question.text}], stream=True
    )
    async for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


@workflow.defn
class Streamed:
    @workflow.init
    def __init__(self, question: Question, missed: float) -> None:
        self.stream = WorkflowStream()

    @workflow.run
    async def run(self, question: Question, missed: float) -> str:
        return await workflow.execute_activity(
            answer_in_pieces,
            question,
            start_to_close_timeout=PATIENT,
            heartbeat_timeout=timedelta(seconds=missed),  # until a worker is taken for dead
            retry_policy=RETRY,
        )


@activity.defn
async def answer_at_once(question: Question) -> str:
    tokens: list[str] = []
    async for token in tokens_of(question):
        note(question.ledger, f"token {time.time()}")
        tokens.append(token)
    return "".join(tokens)


@workflow.defn
class Polled:
    """The control: without a stream, there is nothing to see before the activity returns."""

    def __init__(self) -> None:
        self.text = ""

    @workflow.run
    async def run(self, question: Question) -> str:
        self.text = await workflow.execute_activity(answer_at_once, question, start_to_close_timeout=PATIENT)
        await workflow.sleep(0.5)
        return self.text

    @workflow.query
    def so_far(self) -> str:
        return self.text


@dataclass(frozen=True)
class Seen:
    """A piece as a subscriber saw it."""

    offset: int
    piece: Piece
    at: float


async def subscribe(lab: Lab, workflow_id: str, seen: list[Seen], offset: int = 0, enough: int = 10**6) -> None:
    """Collect the pieces of a workflow's answer until it ends, or until there are enough."""
    stream, pause = WorkflowStreamClient.create(lab.client, workflow_id), timedelta(milliseconds=20)
    while True:
        try:
            async for item in stream.subscribe("answer", offset, result_type=Piece, poll_cooldown=pause):
                seen.append(Seen(item.offset, item.data, time.time()))
                offset = item.offset + 1
                if len(seen) >= enough:
                    return
            return
        except RPCError:
            await asyncio.sleep(0.1)  # not answered in time, as while no worker is there: go on from here


def text_of(seen: Sequence[Seen]) -> str:
    """What a subscriber shows in the end: it begins anew whenever it is told to."""
    tokens: list[str] = []
    for one in seen:
        tokens = [] if one.piece.index < 0 else [*tokens, one.piece.text]
    return "".join(tokens)


def in_order(seen: Sequence[Seen]) -> bool:
    """Whether nothing is missing, twice or out of place: neither offsets, nor the tokens of an attempt."""
    offsets = [one.offset for one in seen]
    places = [(one.piece.attempt, one.piece.index) for one in seen]
    count = Counter(attempt for attempt, _ in places)
    wanted = [(attempt, index) for attempt in sorted(count) for index in range(-1, count[attempt] - 1)]
    return offsets == list(range(offsets[0], offsets[0] + len(seen))) and places == wanted


def percentiles(delays: Sequence[float]) -> str:
    cuts = statistics.quantiles(delays, n=20)
    return f"p50 {statistics.median(delays) * 1000:.0f} ms, p95 {cuts[18] * 1000:.0f} ms"


async def start_stream(lab: Lab, model: Model, name: str, missed: float) -> tuple[WorkflowHandle[Any, Any], str, str]:
    """Start a streamed answer. Returns its handle, its task queue, and the ledger of what was answered."""
    queue, ledger = f"{lab.id}-{name}", lab.file(name)
    question = Question(model, COUNTING, ledger)
    handle = await lab.client.start_workflow(
        Streamed.run, args=[question, missed], id=queue, task_queue=queue, task_timeout=SOON
    )  # fmt: skip
    return handle, queue, ledger


async def streamed(lab: Lab, model: Endpoint) -> list[Evidence]:
    """One subscriber from the start, one that is cut off and comes back, and one that comes after the end."""
    handle, queue, ledger = await start_stream(lab, model.model, "stream", missed=30)
    seen: list[Seen] = []
    broken: list[Seen] = []
    late: list[Seen] = []
    async with lab.worker_process([Streamed], [answer_in_pieces], task_queue=queue, **PROMPT):
        subscriber = asyncio.create_task(subscribe(lab, handle.id, seen))
        async with asyncio.timeout(60):
            await subscribe(lab, handle.id, broken, enough=10)
            before = len(broken)
            await until(lambda: len(seen) >= before + 5, "others have seen more by now", every=0.02)
            await subscribe(lab, handle.id, broken, offset=broken[-1].offset + 1)
            await subscriber
            result = await handle.result()
            middle = len(seen) // 2
            await subscribe(lab, handle.id, late, offset=middle)
    answered = json.loads(notes(ledger)[0])
    count = await count_events(handle)
    ended = next(time for time in event_times(await history_of(handle), "ACTIVITY_TASK_COMPLETED")).timestamp()
    delays = [one.at - one.piece.sent for one in seen]
    early = sum(one.at < ended for one in seen)
    return [
        works(
            "an outside subscriber gets the tokens through the workflow while they come: all of them, in order",
            in_order(seen) and text_of(seen) == answered == result and early > 10,
            f"{len(seen) - 1} tokens, offsets without gaps; {early} of {len(seen)} pieces seen before the activity "
            f"ended; publish to sight {percentiles(delays)} (batches of 50 ms)",
        ),
        holds(
            "a subscriber that comes after the end catches up from an offset",
            [(one.offset, one.piece) for one in late] == [(one.offset, one.piece) for one in seen[middle:]],
            f"from offset {middle}: {len(late)} of {len(seen) - middle} pieces, equal to those seen live",
        ),
        holds(
            "a subscriber that was cut off reconnects behind its last offset: nothing missing, nothing twice",
            in_order(broken) and text_of(broken) == answered and before == 10 < len(broken),
            f"{before} pieces, cut off, {len(broken) - before} pieces after it; "
            f"text equal: {text_of(broken) == answered}",
        ),
        limit(
            "what is streamed costs history: each batch of tokens and each poll of a subscriber is kept",
            count["WORKFLOW_EXECUTION_SIGNALED"] > 1 and count["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"] > 1,
            f"{count.total()} events for {len(seen) - 1} tokens ({count.total() / len(seen):.1f} a token): "
            f"{count['WORKFLOW_EXECUTION_SIGNALED']} batches, {count['WORKFLOW_EXECUTION_UPDATE_ACCEPTED']} polls",
        ),
    ]


async def killed_in_stream(lab: Lab, model: Endpoint) -> list[Evidence]:
    handle, queue, ledger = await start_stream(lab, model.named("stall:1"), "killed", missed=NOTICED.total_seconds())
    seen: list[Seen] = []
    async with lab.worker_process([Streamed], [answer_in_pieces], task_queue=queue, **PROMPT) as worker:
        subscriber = asyncio.create_task(subscribe(lab, handle.id, seen))
        await until(lambda: len(seen) >= 10, "ten pieces have come", every=0.02)
        await worker.kill()
    async with lab.worker_process([Streamed], [answer_in_pieces], task_queue=queue, **PROMPT):
        async with asyncio.timeout(60):
            await subscriber
            result = await handle.result()
    attempts = sorted({one.piece.attempt for one in seen})
    last = [one for one in seen if one.piece.attempt == attempts[-1]]
    twice = Counter(one.piece.index for one in seen if one.piece.index >= 0)
    again = sum(count > 1 for count in twice.values())
    return [
        holds(
            "worker killed in mid-stream: a marker tells the subscriber to begin anew, and the final text is right",
            len(attempts) >= 2 and notes(ledger) == [json.dumps(result)] and text_of(seen) == result and in_order(last),
            f"SIGKILL after {len(seen) - len(last)} pieces; attempts seen: {attempts}; tokens of the last attempt: "
            f"{len(last) - 1}; text equals the result: {text_of(seen) == result}",
        ),
        limit(
            "the tokens of a killed attempt come again; without a marker of one's own the text would be wrong",
            again > 0 and "".join(one.piece.text for one in seen) != result,
            f"{again} of {len(twice)} tokens came twice",
        ),
    ]


async def polled(lab: Lab, model: Endpoint) -> Evidence:
    queue, ledger = f"{lab.id}-polled", lab.file("polled")
    partial: list[str] = []
    async with lab.worker_process([Polled], [answer_at_once], task_queue=queue, **PROMPT):
        question = Question(model.model, COUNTING, ledger)
        handle = await lab.client.start_workflow(Polled.run, question, id=queue, task_queue=queue)
        await until(lambda: notes(ledger), "the first token has come")
        polls, text = 0, ""
        while not text:
            text, polls = await handle.query(Polled.so_far), polls + 1
            partial += [text] if text else []
            await asyncio.sleep(0.02)
        shown = time.time()
        result = await handle.result()
        count = await count_events(handle)
    delays = [shown - float(line.split()[1]) for line in notes(ledger)]
    return control(
        "without a stream, polling by query shows nothing until the whole answer is there",
        partial == [result] and len(delays) > 10 and polls > 1,
        f"{polls} polls, the first text seen was the whole; token to sight {percentiles(delays)}; "
        f"{count.total()} events",
    )


@AI.item("AI-04", "Streaming", seconds=150)
async def streaming(lab: Lab) -> AsyncIterator[Evidence]:
    """Tokens go from an activity through its workflow to subscribers who are early, late and cut off."""
    async with an_endpoint(lab) as model:
        parts = (killed_in_stream, streamed, polled)
        async for evidence in side_by_side(*(part(lab, model) for part in parts)):
            yield evidence
    yield native(
        "the stream is the SDK's; the marker for a new attempt is the user's",
        WorkflowStream,
        WorkflowStreamClient.create,
        WorkflowStreamClient.from_within_activity,
        WorkflowStreamClient.topic,
        WorkflowStreamClient.subscribe,
        workflow.init,
        adds=["a marker for a new attempt"],
    )


# AI-05 Agent frameworks ------------------------------------------------------------------------------
# With an integration, each model call and each tool of an agent is an activity of its own, and a crash
# repeats none of them. A framework run whole inside one activity starts over.


# The frameworks take 3 s of imports: too much for each worker process, and for the nursery that the other
# items wait for. The processes of this item are forked from a nursery of its own, which has imported them.
Fork = Callable[..., contextlib.AbstractAsyncContextManager[Child]]


@dataclass
class Shopping:
    model: Model
    product: str

    @property
    def prompt(self) -> str:
        return (
            f"Find out the stock of the product '{self.product}', then reserve it. Call each tool exactly once, "
            "one after the other, and then report what the tools said."
        )


class Shop:
    """Tools, with what they need and a model must not see. Products bring trouble: a lamp kills the worker."""

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger

    @activity.defn
    async def stock(self, product: str) -> str:
        """How many pieces of a product are in stock."""
        note(self.ledger, f"stock {product}")
        return "7 in stock"

    @activity.defn
    async def reserve(self, product: str) -> str:
        """Reserve one piece of a product."""
        note(self.ledger, f"reserve {product}")
        times = notes(self.ledger).count(f"reserve {product}")
        if product == "lamp" and times == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if product == "vase" and times <= 2:
            raise RuntimeError("the shop is busy")
        return "reserved as R-1"

    @activity.defn
    async def shop_by_graph(self, shopping: Shopping) -> str:
        """A LangGraph agent, whole inside one activity."""
        async with beating():
            return await run_graph(shopping, self)


async def run_graph(shopping: Shopping, shop: Shop) -> str:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode, tools_condition

    tools: list[Any] = [shop.stock, shop.reserve]
    llm = ChatOpenAI(
        model=shopping.model.name, base_url=shopping.model.url, api_key=model_key, max_retries=0
    ).bind_tools(tools)  # fmt: skip

    async def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("think", think)
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", tools_condition)
    graph.add_edge("tools", "think")
    final = await graph.compile().ainvoke({"messages": [HumanMessage(shopping.prompt)]})
    return str(final["messages"][-1].content)


@workflow.defn
class GraphInActivity:
    @workflow.run
    async def run(self, shopping: Shopping) -> str:
        return await workflow.execute_activity_method(
            Shop.shop_by_graph,
            shopping,
            start_to_close_timeout=PATIENT,
            heartbeat_timeout=NOTICED,
            retry_policy=RETRY,
        )


@workflow.defn
class AgentShopping:
    """An agent of the OpenAI Agents SDK. Its runner is replaced by the plugin's, its tools are activities."""

    @workflow.run
    async def run(self, shopping: Shopping) -> str:
        with workflow.unsafe.imports_passed_through():
            from agents import Runner
            from temporalio.openai_agents.workflow import activity_as_tool

        tools = [
            activity_as_tool(tool, start_to_close_timeout=NOTICED, retry_policy=RETRY)
            for tool in (Shop.stock, Shop.reserve)
        ]
        result = await Runner.run(shopper(shopping, tools), shopping.prompt)
        return str(result.final_output)


def shopper(shopping: Shopping, tools: "list[AgentTool]") -> Any:
    from agents import Agent

    return Agent(name="Shopper", instructions="You buy things.", model=shopping.model.name, tools=tools)


async def serve_agents(target: Target, task_queue: str, url: str, ledger: str) -> None:
    """The life of a worker process with the plugin and the tools."""
    from agents import OpenAIProvider
    from temporalio.openai_agents import ModelActivityParameters, OpenAIAgentsPlugin

    plugin = OpenAIAgentsPlugin(
        model_params=ModelActivityParameters(start_to_close_timeout=PATIENT, retry_policy=RETRY),
        model_provider=OpenAIProvider(openai_client=model_client(url), use_responses=False),
    )
    client = await connect(target, plugins=[plugin])
    shop = Shop(ledger)
    tools: list[Callable[..., Any]] = [shop.stock, shop.reserve, shop.shop_by_graph]
    async with make_worker(client, task_queue, [AgentShopping, GraphInActivity], tools, **PROMPT):
        await asyncio.Future()


async def shop_without_temporal(shopping: Shopping, ledger: str) -> None:
    """The control: the same agent as an ordinary program."""
    from agents import OpenAIProvider, RunConfig, Runner, function_tool

    shop = Shop(ledger)
    tools: list[AgentTool] = [function_tool(shop.stock), function_tool(shop.reserve)]
    provider = OpenAIProvider(openai_client=model_client(shopping.model.url), use_responses=False)
    result = await Runner.run(shopper(shopping, tools), shopping.prompt, run_config=RunConfig(model_provider=provider))
    note(ledger, str(result.final_output))


def look_up_plugin(file: str) -> None:
    """Look the plugin up where it is imported: this takes 3 s, which the main process need not spend."""
    from temporalio.openai_agents import ModelActivityParameters, OpenAIAgentsPlugin
    from temporalio.openai_agents.workflow import activity_as_tool

    evidence = native(
        "the plugin is generally available, and the agent needs no line for its recovery",
        (Client.connect, "plugins"),
        (OpenAIAgentsPlugin, "model_params"),
        (OpenAIAgentsPlugin, "model_provider"),
        (ModelActivityParameters, "start_to_close_timeout"),
        (ModelActivityParameters, "retry_policy"),
        activity_as_tool,
        workflow.execute_activity_method,
        activity.heartbeat,
        workflow.unsafe.imports_passed_through,
        adds=keywords_in([AgentShopping, shopper], "try", "except"),
    )
    note(file, json.dumps(asdict(evidence)))


async def plugin_is_native(lab: Lab, model: Endpoint, fork: Fork) -> Evidence:
    async with fork(look_up_plugin, lab.file("native")) as child:
        await child.wait()
    return Evidence(**json.loads(notes(lab.file("native"))[0]))


async def shop(lab: Lab, shopping: Shopping, kind: type, queue: str) -> str:
    """Let an agent shop, and return its report, or why there is none."""
    handle: WorkflowHandle[Any, str] = await lab.client.start_workflow(
        kind.__name__, shopping, id=f"{queue}-{shopping.product}", task_queue=queue, task_timeout=SOON, result_type=str
    )
    try:
        return await handle.result()
    except WorkflowFailureError as error:
        return f"failed: {causes(error)[-1]}"


async def shop_and_die(lab: Lab, fork: Fork, shopping: Shopping, kind: type, name: str) -> tuple[str, list[str]]:
    """The same with a product that kills the worker, and a second worker. Returns (report, tools that ran)."""
    queue, ledger = f"{lab.id}-{name}", lab.file(name)
    report = asyncio.create_task(shop(lab, shopping, kind, queue))
    async with fork(serve_agents, lab.target, queue, shopping.model.url, ledger) as worker:
        await worker.wait(60)
    async with fork(serve_agents, lab.target, queue, shopping.model.url, ledger):
        return await report, notes(ledger)


def reports(text: str) -> bool:
    """Whether the agent says what its tools found out."""
    return "7" in text and "R-1" in text


def turns(model: Endpoint, shopping: Shopping) -> list[int]:
    """At which length of the conversation the model was called, in the order of the calls; 1 is the first turn."""
    if not model.local:
        return []
    lengths = [call.turn for call in model.calls(shopping.model)]
    return [1 + (length - min(lengths)) // 2 for length in lengths]


def told(model: Endpoint, shopping: Shopping) -> str:
    return f"turns the model saw: {turns(model, shopping)}" if model.local else "model calls: not told"


def tools_for(product: str, ledger: str) -> list[str]:
    """The tools that ran for a product."""
    return [line.split()[0] for line in notes(ledger) if line.split()[1] == product]


async def agents_at_work(lab: Lab, model: Endpoint, fork: Fork) -> list[Evidence]:
    """Agents whose worker stays alive; their tools and their model do not always."""
    queue, ledger = f"{lab.id}-alive", lab.file("alive")
    agent, graph, flaky = (Shopping(model.named(product), product) for product in ("mug", "bowl", "vase"))
    async with fork(serve_agents, lab.target, queue, model.url, ledger):
        reported = await asyncio.gather(
            shop(lab, agent, AgentShopping, queue),
            shop(lab, graph, GraphInActivity, queue),
            shop(lab, flaky, AgentShopping, queue),
        )
        failing = await model_errors(lab, model, queue, ledger)
    tools = [tools_for(one.product, ledger) for one in (agent, graph, flaky)]
    seen = [turns(model, one) for one in (agent, graph, flaky)]
    measured = [
        f"tools that ran: {', '.join(ran)}; {told(model, one)}; report: {report[:80]!r}"
        for one, ran, report in zip((agent, graph, flaky), tools, reported, strict=True)
    ]
    fine = [reports(report) and turn in ([], [1, 2, 3]) for report, turn in zip(reported, seen, strict=True)]
    return [
        works(
            "OpenAI Agents SDK by Temporal's plugin: the agent uses its tools and reports",
            fine[0] and tools[0] == ["stock", "reserve"],
            measured[0],
        ),
        works(
            "LangGraph inside an activity: the agent uses its tools and reports",
            fine[1] and tools[1] == ["stock", "reserve"],
            measured[1],
        ),
        holds(
            "plugin: a tool that fails twice is retried without the model being asked again",
            fine[2] and tools[2] == ["stock", "reserve", "reserve", "reserve"],
            measured[2],
        ),
        failing,
    ]


async def model_errors(lab: Lab, model: Endpoint, queue: str, ledger: str) -> Evidence:
    claim = "plugin: a 500 of the model is retried, a 400 fails the workflow at once"
    if not model.local:
        return holds(claim, None, UNSEEN)
    shaky, wrong = Shopping(model.named("500:1/agent"), "cup"), Shopping(model.named("400:9/agent"), "jug")
    report, why = await asyncio.gather(*(shop(lab, one, AgentShopping, queue) for one in (shaky, wrong)))
    return holds(
        claim,
        reports(report) and tools_for("cup", ledger) == ["stock", "reserve"] and turns(model, shaky) == [1, 1, 2, 3]
        and turns(model, wrong) == [1] and why.startswith("failed") and "400" in why,
        f"500 once: {told(model, shaky)}, report: {report[:80]!r}; 400: {told(model, wrong)}, {why}",
    )  # fmt: skip


async def agent_killed(lab: Lab, model: Endpoint, fork: Fork) -> Evidence:
    claim = "plugin: worker killed inside the second tool: no model call and no finished tool is repeated"
    shopping = Shopping(model.named("agent-killed"), "lamp")
    report, tools = await shop_and_die(lab, fork, shopping, AgentShopping, "agent-killed")
    right = reports(report) and tools == ["stock lamp", "reserve lamp", "reserve lamp"]
    return holds(
        claim,
        (right and turns(model, shopping) == [1, 2, 3]) if model.local else None,
        f"tools that ran: {', '.join(tools)}; {told(model, shopping)}; report: {report[:80]!r}"
        if model.local
        else UNSEEN,
    )


async def graph_killed(lab: Lab, model: Endpoint, fork: Fork) -> list[Evidence]:
    shopping = Shopping(model.named("graph-killed"), "lamp")
    report, tools = await shop_and_die(lab, fork, shopping, GraphInActivity, "graph-killed")
    repeated = turns(model, shopping)
    measured = f"tools that ran: {', '.join(tools)}; {told(model, shopping)}; report: {report[:80]!r}"
    whole = ["stock lamp", "reserve lamp"]
    return [
        holds(
            "graph in an activity: worker killed inside the second tool: it finishes, on a second attempt",
            reports(report) and tools == whole * 2,
            measured,
        ),
        limit(
            "a framework run whole inside an activity starts over: its finished model calls and tools are repeated",
            tools == whole * 2 and repeated in ([], [1, 2, 1, 2, 3]),
            measured,
        ),
    ]


async def agent_without_temporal(lab: Lab, model: Endpoint, fork: Fork) -> Evidence:
    shopping, ledger = Shopping(model.named("plain"), "lamp"), lab.file("plain")
    async with fork(shop_without_temporal, shopping, ledger) as program:
        first = await program.wait()
    async with fork(shop_without_temporal, shopping, ledger) as program:
        await program.wait()
    tools = notes(ledger)[:-1]
    return control(
        "the same agent without Temporal starts over after the kill",
        first == -signal.SIGKILL and tools == ["stock lamp", "reserve lamp"] * 2
        and turns(model, shopping) in ([], [1, 2, 1, 2, 3]),
        f"tools that ran: {', '.join(tools)}; {told(model, shopping)}",
    )  # fmt: skip


@AI.item("AI-05", "Agent frameworks", seconds=180)
async def agent_frameworks(lab: Lab) -> AsyncIterator[Evidence]:
    """One agent in two frameworks; its worker dies in mid-agent, its tool and its model fail."""
    frameworks = ("temporalio.openai_agents", "langgraph.prebuilt", "langchain_openai")
    with lab.nursery(*frameworks) as nursery:
        async with an_endpoint(lab) as model:
            fork = functools.partial(lab.process, nursery=nursery)
            parts = (agent_killed, graph_killed, agent_without_temporal, agents_at_work, plugin_is_native)
            async for evidence in side_by_side(*(part(lab, model, fork) for part in parts)):
                yield evidence
    yield cited(
        "CrewAI has no integration and fits only inside an activity, as LangGraph does here",
        "a script in comparison/, with dependencies of its own: crewai and openai-agents do not resolve together",
    )


# AI-06 Tool execution --------------------------------------------------------------------------------
# Each tool is an activity with a patience of its own. What a tool cannot do, the model is told, and goes
# on; when to stop is the workflow's to say.


@dataclass
class ToolCall:
    id: str
    name: str
    arguments: str


@dataclass
class Turn:
    message: dict[str, Any]  # as it goes back to the model
    calls: list[ToolCall]


@dataclass
class Chat:
    model: Model
    messages: list[dict[str, Any]]
    tools: list[str]


@activity.defn
async def chat(request: Chat) -> Turn:
    """One turn of the model, which answers or asks for tools."""
    tools: Any = [{"type": "function", "function": TOOLS[name]} for name in request.tools]
    try:
        completion = await model_client(request.model.url).chat.completions.create(
            model=request.model.name, messages=list[Any](request.messages), tools=tools
        )
    except openai.APIStatusError as error:
        raise for_temporal(error) from None
    message = completion.choices[0].message
    calls = [
        ToolCall(one.id, one.function.name, one.function.arguments)
        for one in message.tool_calls or []
        if one.type == "function"
    ]
    return Turn(message.model_dump(exclude_none=True), calls)


def tool(name: str, description: str) -> dict[str, Any]:
    """A tool as the model is told of it: each takes a topic."""
    parameters = {"type": "object", "properties": {"topic": {"type": "string"}}, "required": ["topic"]}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS = {
    name: tool(name, description)
    for name, description in {
        "flaky": "Look a topic up in the first source.",
        "slow": "Look a topic up in the second source.",
        "hanging": "Look a topic up in the third source.",
        "poison": "Look a topic up in the fourth source.",
        "long": "Look a topic up in the archive.",
        "mcp": "Count the letters of a topic.",
    }.items()
}

# How patient to be with each tool, and how often to try it.
PATIENCE: dict[str, workflow.ActivityConfig] = {
    "flaky": {"start_to_close_timeout": PATIENT, "retry_policy": RETRY},
    "slow": {"start_to_close_timeout": PATIENT, "retry_policy": RetryPolicy(maximum_attempts=1)},
    "hanging": {"start_to_close_timeout": PATIENT, "heartbeat_timeout": NOTICED, "retry_policy": RETRY},
    "poison": {"start_to_close_timeout": PATIENT, "retry_policy": RetryPolicy(maximum_attempts=1)},
    "long": {"start_to_close_timeout": PATIENT, "heartbeat_timeout": NOTICED, "retry_policy": RETRY},
    "mcp": {"start_to_close_timeout": PATIENT, "heartbeat_timeout": NOTICED, "retry_policy": RETRY},
}


class Toolbox:
    """The tools, with what they need and a model must not see."""

    def __init__(self, ledger: str, mcp_server: str = "") -> None:
        self.ledger, self.mcp_server = ledger, mcp_server

    def begin(self) -> int:
        info = activity.info()
        note(self.ledger, f"begin {info.activity_type} {info.attempt}")
        return info.attempt

    def end(self, result: str) -> str:
        note(self.ledger, f"end {activity.info().activity_type}")
        return result

    @activity.defn
    async def flaky(self, topic: str) -> str:
        if self.begin() < 3:
            raise RuntimeError("the source is busy")
        return self.end("flaky says 11")

    @activity.defn
    async def slow(self, topic: str) -> str:
        self.begin()
        await asyncio.sleep(1)
        return self.end("slow says 22")

    @activity.defn
    async def hanging(self, topic: str) -> str:
        if self.begin() == 1:
            await asyncio.sleep(3600)  # and no heartbeat, so that it is noticed
        return self.end("hanging says 33")

    @activity.defn
    async def poison(self, topic: str) -> str:
        self.begin()
        raise RuntimeError("the source does not exist")

    @activity.defn
    async def long(self, topic: str) -> str:
        """Twenty pages. The last one finished goes with the heartbeat, and comes back to the next attempt."""
        attempt = self.begin()
        done = activity.info().heartbeat_details
        first = done[0] + 1 if done else 1
        try:
            for page in range(first, 21):
                # The first attempt comes no further, so that it can be killed in the middle.
                await asyncio.sleep(3600 if attempt == 1 and page == 12 else 0.1)
                note(self.ledger, f"page {page}")
                activity.heartbeat(page)
        except asyncio.CancelledError:
            note(self.ledger, "cancelled")
            raise
        return self.end("20 pages read")

    @activity.defn
    async def mcp(self, topic: str) -> str:
        """A tool of an MCP server, which is started for the call and speaks over stdin and stdout."""
        self.begin()
        async with beating():
            return self.end(await call_mcp(self.mcp_server, topic))


@dataclass
class Task:
    model: Model
    prompt: str
    tools: list[str]
    budget: int = 10  # so many tool calls at most
    forgiving: bool = True  # a failed tool is reported to the model instead of failing the workflow


@dataclass
class Outcome:
    text: str
    messages: list[dict[str, Any]] = field(default_factory=list)


@workflow.defn
class ToolLoop:
    """The loop of an agent: the model asks for tools until it has an answer, or is stopped."""

    def __init__(self) -> None:
        self.stopped = False

    @workflow.run
    async def run(self, task: Task) -> Outcome:
        work = asyncio.create_task(self.loop(task))
        await workflow.wait_condition(lambda: work.done() or self.stopped)
        if not work.done():
            work.cancel()
            await workflow.wait_condition(work.done)
            return Outcome("stopped by a person")
        return await work

    async def loop(self, task: Task) -> Outcome:
        messages: list[dict[str, Any]] = [{"role": "user", "content": task.prompt}]
        used = 0
        while True:
            turn = await workflow.execute_activity(
                chat, Chat(task.model, messages, task.tools), start_to_close_timeout=PATIENT, retry_policy=RETRY
            )
            messages.append(turn.message)
            if not turn.calls:
                return Outcome(str(turn.message.get("content")), messages)
            used += len(turn.calls)
            if used > task.budget:
                return Outcome(f"stopped by the budget of {task.budget} tool calls", messages)
            # Side by side, and in the order in which the model asked.
            messages += await asyncio.gather(*(self.use(call, task.forgiving) for call in turn.calls))

    async def use(self, call: ToolCall, forgiving: bool) -> dict[str, Any]:
        try:
            topic = json.loads(call.arguments)["topic"]
            result = await workflow.execute_activity(call.name, topic, result_type=str, **PATIENCE[call.name])
        except ActivityError as error:
            # A stop is no failure of the tool.
            if is_cancelled_exception(error) or not forgiving:
                raise
            result = f"The tool failed: {error.cause}"
        return {"role": "tool", "tool_call_id": call.id, "content": result}

    @workflow.signal
    def stop(self) -> None:
        self.stopped = True


async def serve_tools(target: Target, task_queue: str, toolbox: Toolbox) -> None:
    """The life of a worker process with the tools."""
    if toolbox.mcp_server:
        importlib.import_module("mcp")  # takes 1 s, in which an activity could not heartbeat
    client, box = await connect(target), toolbox
    tools: list[Callable[..., Any]] = [chat, box.flaky, box.slow, box.hanging, box.poison, box.long, box.mcp]
    async with make_worker(client, task_queue, [ToolLoop], tools, **PROMPT):
        await asyncio.Future()


async def begin_task(lab: Lab, task: Task, name: str) -> tuple[WorkflowHandle[Any, Outcome], str, Toolbox]:
    """Start an agent. Returns its handle, its task queue, and the toolbox for its workers."""
    queue = f"{lab.id}-{name}"
    handle = await lab.client.start_workflow(ToolLoop.run, task, id=queue, task_queue=queue, task_timeout=SOON)
    return handle, queue, Toolbox(lab.file(name))


def prompt_for(tools: Sequence[str], how: str) -> str:
    named = ", ".join(tools)
    return f"Look up the topic 'tides' with each of the tools {named}, once each, {how}. Then report what they said."


def begun(ledger: str) -> Counter[str]:
    """How often each tool was begun."""
    return Counter(line.split()[1] for line in notes(ledger) if line.startswith("begin"))


TROUBLE = ["hanging", "slow", "flaky", "poison"]


async def four_bad_tools(lab: Lab, model: Endpoint) -> list[Evidence]:
    """The model asks for four tools at once; each is bad in its own way."""
    task = Task(model.named("bad"), prompt_for(TROUBLE, "all at once"), TROUBLE)
    handle, queue, box = await begin_task(lab, task, "bad")
    async with lab.process(serve_tools, lab.target, queue, box):
        outcome = await handle.result()
    results = [one["content"] for one in outcome.messages if one["role"] == "tool"]
    attempts, lines = begun(box.ledger), notes(box.ledger)
    first_end = next(number for number, line in enumerate(lines) if line.startswith("end"))
    together = {line.split()[1] for line in lines[:first_end] if line.startswith("begin")}
    ended = [line.split()[1] for line in lines if line.startswith("end")]
    said = ["hanging says 33", "slow says 22", "flaky says 11", "The tool failed: RuntimeError: the source does not"]
    found = [text.startswith(start) for text, start in zip(results, said, strict=False)]
    return [
        works(
            "a flaky, a slow, a hanging and a poison tool: the loop ends with what three said and why one failed",
            found == [True] * 4 and attempts == {"flaky": 3, "slow": 1, "hanging": 2, "poison": 1}
            and all(number in outcome.text for number in ("11", "22", "33")),
            f"attempts: {', '.join(f'{name} {count}' for name, count in attempts.items())}; told to the model: "
            f"{results[3][:60]!r}; its answer: {outcome.text[:110]!r}",
        ),
        holds(
            "tools that the model asks for at once run at once, and their results keep the order of the calls",
            together == set(TROUBLE) and found == [True] * 4 and ended != [one for one in TROUBLE if one in ended],
            f"begun before the first of them ended: {len(together)} of {len(TROUBLE)}; ended: {', '.join(ended)}; "
            f"results in the order of the calls: {', '.join(text.split()[0] for text in results)}",
        ),
    ]  # fmt: skip


async def long_tool_killed(lab: Lab, model: Endpoint) -> Evidence:
    task = Task(model.named("long"), prompt_for(["long"], "one after the other"), ["long"])
    handle, queue, box = await begin_task(lab, task, "long")
    async with lab.process(serve_tools, lab.target, queue, box) as worker:
        await until(lambda: "page 11" in notes(box.ledger), "eleven pages are read", every=0.02)
        await worker.kill()
    async with lab.process(serve_tools, lab.target, queue, box):
        outcome = await handle.result()
    lines = notes(box.ledger)
    second = lines.index("begin long 2")
    before, after = ([int(line.split()[1]) for line in part if line.startswith("page")]
                     for part in (lines[:second], lines[second:]))  # fmt: skip
    return holds(
        "a long tool goes on where its last heartbeat was when its worker is killed",
        1 < after[0] <= before[-1] + 1 and after == list(range(after[0], 21)) and begun(box.ledger) == {"long": 2}
        and "20 pages read" in outcome.text,
        f"SIGKILL after page {before[-1]} of 20; the second attempt began at page {after[0]}; "
        f"pages read twice: {len(set(before) & set(after))}",
    )  # fmt: skip


async def budget(lab: Lab, model: Endpoint) -> Evidence:
    claim = "a model that never stops asking for tools is stopped by the budget"
    if not model.local:
        return holds(claim, None, UNSEEN)
    task = Task(model.named("endless:99"), prompt_for(["flaky"], "one after the other"), ["flaky"], budget=3)
    handle, queue, box = await begin_task(lab, task, "budget")
    async with lab.process(serve_tools, lab.target, queue, box):
        outcome = await handle.result()
    ended = notes(box.ledger).count("end flaky")
    return holds(
        claim,
        outcome.text == "stopped by the budget of 3 tool calls" and ended == 3 and len(model.calls(task.model)) == 4,
        f"{outcome.text}; tools that ran: {ended}; turns of the model: {len(model.calls(task.model))}",
    )


async def stop(lab: Lab, model: Endpoint) -> Evidence:
    task = Task(model.named("stop"), prompt_for(["long"], "one after the other"), ["long"])
    handle, queue, box = await begin_task(lab, task, "stop")
    async with lab.process(serve_tools, lab.target, queue, box):
        await until(lambda: "page 2" in notes(box.ledger), "the tool has begun", every=0.02)
        await handle.signal(ToolLoop.stop)
        outcome = await handle.result()
        await until(lambda: "cancelled" in notes(box.ledger), "the tool was told")
        lines = notes(box.ledger)
    return holds(
        "a person stops the agent: the tool that is running is cancelled, and nothing more begins",
        outcome.text == "stopped by a person" and lines[-1] == "cancelled" and "end long" not in lines
        and begun(box.ledger) == {"long": 1},
        f"{outcome.text}; the tool was told after page {lines[-2].split()[1]} of 20",
    )  # fmt: skip


# A server of tools as anyone could install one. Its first process never answers, so that it can be cut off.
MCP_SERVER = """
import asyncio, os, sys
from mcp.server.mcpserver import MCPServer

server = MCPServer("letters")
ledger = sys.argv[1]
with open(ledger, "a") as file:
    print(os.getpid(), file=file)


@server.tool()
async def count_letters(topic: str) -> str:
    with open(ledger, "a") as file:
        print("asked", file=file)
    if len(open(ledger).readlines()) == 2:
        await asyncio.sleep(20)
    return f"{len(topic)} letters"


server.run("stdio")
"""


def mcp_server(lab: Lab) -> str:
    """Write the MCP server into the item's folder, as if it were installed. Returns its path."""
    path = Path(lab.file("mcp_server.py"))
    path.write_text(MCP_SERVER, encoding="utf-8")
    return str(path)


async def call_mcp(path: str, topic: str) -> str:
    from mcp import Client, StdioServerParameters

    server = StdioServerParameters(command=sys.executable, args=[path, f"{path}.ledger"])
    async with Client(server) as client:
        result = await client.call_tool("count_letters", {"topic": topic})
    return " ".join(one.text for one in result.content if one.type == "text")


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for counts as ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


async def mcp_tool(lab: Lab, model: Endpoint) -> Evidence:
    task = Task(model.named("mcp"), prompt_for(["mcp"], "one after the other"), ["mcp"])
    handle, queue, box = await begin_task(lab, task, "mcp")
    box.mcp_server = mcp_server(lab)
    servers = f"{box.mcp_server}.ledger"

    def pids() -> list[int]:
        return [int(line) for line in notes(servers) if line.isdigit()]

    try:
        async with lab.process(serve_tools, lab.target, queue, box) as worker:
            await until(lambda: "asked" in notes(servers), "the MCP server was asked")
            await worker.kill()
        async with lab.process(serve_tools, lab.target, queue, box):
            outcome = await handle.result()
        ended = await until(lambda: all(map(gone, pids())), "the MCP servers have ended", 10)
    finally:
        for pid in pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return holds(
        "a tool of an MCP server over stdio; its worker killed in mid-call: asked again, no server is left behind",
        "5 letters" in outcome.text and len(pids()) == 2 and notes(servers).count("asked") == 2,
        f"MCP servers started: {len(pids())}, asked: {notes(servers).count('asked')}, all ended {ended:.1f} s "
        f"after the answer; {outcome.text[:80]!r}",
    )


async def unforgiving(lab: Lab, model: Endpoint) -> Evidence:
    task = Task(model.named("poison"), prompt_for(["poison"], "one after the other"), ["poison"], forgiving=False)
    handle, queue, box = await begin_task(lab, task, "unforgiving")
    why = ""
    async with lab.process(serve_tools, lab.target, queue, box):
        try:
            await handle.result()
        except WorkflowFailureError as error:
            why = str(causes(error)[-1])
    status = await status_of(handle)
    return control(
        "without handling, one tool that fails is the end of the agent",
        status == WorkflowExecutionStatus.FAILED and "does not exist" in why and begun(box.ledger) == {"poison": 1},
        f"status {name_of(status)}: {why}",
    )


@AI.item("AI-06", "Tool execution", seconds=150)
async def tool_execution(lab: Lab) -> AsyncIterator[Evidence]:
    """An agent's tools fail, hang, die and are stopped; a ledger says which of them really ran."""
    async with an_endpoint(lab) as model:
        parts = (mcp_tool, four_bad_tools, long_tool_killed, stop, budget, unforgiving)
        async for evidence in side_by_side(*(part(lab, model) for part in parts)):
            yield evidence
    yield native(
        "patience, retries, heartbeats and stopping of tools are the SDK's; the loop of the agent, its budget and its "
        "errors were written here (a framework's plugin, as in AI-05, brings the loop)",
        (workflow.execute_activity, "start_to_close_timeout"),
        (workflow.execute_activity, "heartbeat_timeout"),
        (workflow.execute_activity, "retry_policy"),
        (RetryPolicy, "maximum_attempts"),
        workflow.ActivityConfig,
        workflow.signal,
        workflow.wait_condition,
        activity.heartbeat,
        (activity.Info, "heartbeat_details"),
        adds=["the loop", "the budget", *keywords_in([ToolLoop], "except")],
    )


if __name__ == "__main__":
    run(AI)
