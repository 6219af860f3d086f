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
    NotRun,
    Spread,
    at_least,
    at_most,
    between,
    cited,
    connect,
    contains,
    control,
    differs,
    equal,
    figure,
    holds,
    limit,
    native,
    not_run,
    piece,
    sdk_version,
    side_by_side,
    slowness,
    works,
)
from harness.systems import prepared, running
from lab import (
    PROMPT,
    Child,
    Ending,
    Handle,
    Lab,
    Nursery,
    Server,
    count_events,
    end,
    ended,
    event_times,
    fail,
    failed_tasks,
    happened,
    history_of,
    hold,
    is_closed_or_stuck,
    keywords_in,
    note,
    notes,
    open_gate,
    outline,
    pending,
    refuse,
    repeated,
    run,
    said,
    sandbox,
    soon,
    status_of,
    together,
    until,
    withhold,
)

import asyncio
import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import secrets
import signal
import socket
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from temporalio import activity, workflow
from temporalio.api.enums.v1 import EventType
from temporalio.api.failure.v1 import Failure
from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowHistory,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
    WorkflowUpdateStage,
)
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception
from temporalio.service import RetryConfig, RPCError, RPCStatusCode
from temporalio.worker import (
    ExecuteWorkflowInput,
    Interceptor,
    Replayer,
    Worker,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)
from temporalio.workflow import ActivityCancellationType

with workflow.unsafe.imports_passed_through():
    import h11  # noqa: F401 (what httpx2 would import with its first call, and may not in a workflow)
    import httpcore2  # noqa: F401
    import httpx2
    import openai
    import openai.resources.chat.completions  # or each worker process would import it with its first call
    import truststore  # noqa: F401
    import uvicorn
    from pydantic import BaseModel, PositiveInt, ValidationError
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

with contextlib.suppress(ImportError):  # older than SDK 1.27: AI-04 is not run
    from temporalio.contrib.workflow_streams import WorkflowStream, WorkflowStreamClient

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


# AI-01 LLM call as activity --------------------------------------------------------------------------
# A model call is an activity like any other: answered once, remembered for good. What is yours is to say which errors
# a retry can mend, and to give each call a key: one that is cut off in the middle is made again, and billed twice by a
# provider that does not heed it.

# The client gives up before the activity does, so that the history tells what was wrong.
GIVE_UP = timedelta(seconds=60)
PATIENCE: workflow.ActivityConfig = {
    "start_to_close_timeout": GIVE_UP + timedelta(seconds=10),
    "heartbeat_timeout": timedelta(seconds=10),
    "retry_policy": RetryPolicy(maximum_attempts=6),
}
HOPELESS = {400, 401, 403, 404, 413, 422}  # the request is wrong, and will be the next time


@dataclass
class Question:
    # Of the business, and of nothing else: the ids of workflows and activities come again in a later run. Where the
    # business has none, workflow id, first run id and a name are a key, but what is started anew then asks once more.
    key: str
    text: str
    model: str = ""  # the worker's own, where none is named
    schema: dict[str, Any] | None = None  # of the JSON that is wanted; None for plain text


@dataclass
class Answer:
    text: str
    tokens: int


def model_client(**options: Any) -> openai.AsyncOpenAI:
    """Who retries is Temporal, so the client does not. The key comes from the worker's environment."""
    return openai.AsyncOpenAI(**{"max_retries": 0, "timeout": GIVE_UP.total_seconds(), **options})


class Llm:
    """A model that is handed in, with its key: arguments of workflows are kept in histories."""

    def __init__(self, client: openai.AsyncOpenAI, model: str) -> None:
        self.client, self.model = client, model

    @activity.defn
    async def ask(self, question: Question) -> Answer:
        form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": question.schema}}
        try:
            async with beating():
                completion = await self.client.chat.completions.create(
                    model=question.model or self.model,
                    messages=[{"role": "user", "content": question.text}],
                    response_format=form if question.schema else openai.omit,
                    extra_headers={"Idempotency-Key": question.key},
                )
        except openai.APIError as error:
            # Not "from error": causes go into the history, and some endpoints quote the key in a refusal. The causes of
            # a timeout are longer than the server keeps of a failure.
            raise for_temporal(error) from None
        usage = completion.usage
        return Answer(completion.choices[0].message.content or "", usage.total_tokens if usage else 0)


@contextlib.asynccontextmanager
async def beating() -> AsyncIterator[None]:
    """Tell the server again and again that this activity is alive: one whose worker was killed is noticed soon."""
    timeout = activity.info().heartbeat_timeout or timedelta(seconds=10)

    async def beat() -> None:
        while True:
            activity.heartbeat()
            await asyncio.sleep(timeout.total_seconds() / 4)

    beats = asyncio.create_task(beat())
    try:
        yield
    finally:
        beats.cancel()


def for_temporal(error: openai.APIError) -> ApplicationError:
    """A failure in the terms of a retry policy: whether to try again, and when."""
    if not isinstance(error, openai.APIStatusError):
        return ApplicationError(error.message, type=type(error).__name__)
    return ApplicationError(
        f"the model refused with HTTP {error.status_code}",
        type=f"HTTP {error.status_code}",
        non_retryable=error.status_code in HOPELESS,
        next_retry_delay=delay_of(error.response.headers.get("retry-after", "")),
    )


def delay_of(retry_after: str) -> timedelta | None:
    """Retry-After is a number of seconds or a date; what is neither is not heeded."""
    if retry_after.isdecimal():
        return timedelta(seconds=int(retry_after))
    with contextlib.suppress(ValueError):
        return max(parsedate_to_datetime(retry_after).astimezone(UTC) - datetime.now(UTC), timedelta())
    return None


async def put(question: Question) -> Answer:
    return await workflow.execute_activity_method(Llm.ask, question, **PATIENCE)


@dataclass
class Plan:
    number: str  # of the interview: keys are made of it
    questions: list[str]


@workflow.defn
class Interview:
    """Asks one question after the other."""

    @workflow.run
    async def run(self, plan: Plan) -> list[Answer]:
        return [await put(Question(f"{plan.number}/{n}", text)) for n, text in enumerate(plan.questions, 1)]


def rehearsed(*replies: dict[str, Any]) -> openai.AsyncOpenAI:
    """The model for an example: yours where OPENAI_API_KEY is set, else one without a network that says these."""
    if os.environ.get("OPENAI_API_KEY"):
        return model_client()
    left = iter(replies)

    def reply(request: httpx2.Request) -> httpx2.Response:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": None, **next(left)}}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "none", "choices": [choice]}
        return httpx2.Response(200, json=whole)

    return model_client(api_key="none", http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(reply)))


async def example_ai_01(client: Client) -> None:
    llm = Llm(rehearsed({"content": "Blue."}, {"content": "A cat."}), "gpt-5-mini")
    async with Worker(client, task_queue="interviews", workflows=[Interview], activities=[llm.ask]):
        plan = Plan(str(uuid.uuid4()), ["Name a colour.", "Name an animal."])
        answers = await client.execute_workflow(
            Interview.run, plan, id=f"interview-{plan.number}", task_queue="interviews"
        )
        print(f"{plan.questions} {[answer.text for answer in answers]}")


# AI-01 put to the test -------------------------------------------------------------------------------

QUESTIONS = ["Name a colour.", "Name an animal.", "Name a city."]


def quick_retries(policy: RetryPolicy | None) -> RetryPolicy:
    """The same retries, a tenth of a second apart at first."""
    return replace(policy or RetryPolicy(), initial_interval=timedelta(milliseconds=100))


def shortened(*activities: str, missed: timedelta = timedelta(minutes=5)) -> dict[str, dict[str, Any]]:
    """Options with which retries cost little time, and where a worker is killed, the kill as well."""
    retries = quick_retries(PATIENCE.get("retry_policy"))
    return {name: {"heartbeat_timeout": missed, "retry_policy": retries} for name in activities}


def asking(model: "Endpoint", **options: Any) -> dict[str, Any]:
    """The arguments of a worker that asks questions."""
    parts = {"workflows": [Interview], "activities": [model.llm().ask], "shortened": shortened("ask"), **PROMPT}
    return parts | options


async def kill_between_calls(lab: Lab, model: "Endpoint") -> Evidence:
    """The third question is not put yet, and never will be by this worker."""
    plan = Plan(f"{lab.id}-between", QUESTIONS)
    gate = lab.gate("between")
    taken = await lab.take_over(
        Interview.run, plan, name="between", task_timeout=soon(),
        parts=asking(
            model, faults=[hold("ask", gate, key=f"{plan.number}/3")], shortened=shortened("ask", missed=soon())
        ),
        point=lambda: len(lab.calls(f"{lab.id}-between")) >= 3,
        meanwhile=lambda: open_gate(gate),
    )  # fmt: skip
    answers = taken.ending.result or []
    asked = Counter(call.argument["text"] for call in lab.calls(taken.handle.id, "ended"))
    facts = {"answered_questions": equal(dict(asked), dict.fromkeys(QUESTIONS, 1))}
    if model.local:
        calls = model.calls(plan.number)
        facts |= {"calls_the_model_saw": equal([call.prompt for call in calls], QUESTIONS)}
        tokens = [call.tokens for call in calls]
        facts |= {"tokens_in_the_result": equal([one.tokens for one in answers], tokens)}
    return works(
        "worker killed between two calls: each question was put to the model once, and its token count is kept",
        killed_after_answers=len(taken.before) - 1,
        **facts,
        answers=equal(sum(one.text != "" for one in answers), len(QUESTIONS)),
        least_tokens=at_least(min((one.tokens for one in answers), default=0), 1),
    )


async def interview_plainly(model: "Endpoint", plan: Plan, answers: str, gate: str) -> None:
    """The control: the same interview as an ordinary program. It pauses before the third question."""
    llm = model.llm()
    for number, text in enumerate(plan.questions, 1):
        if number == 3:
            await until(Path(gate).exists, "it may go on")
        completion = await llm.client.chat.completions.create(
            model=llm.model,
            messages=[{"role": "user", "content": text}],
            extra_headers={"Idempotency-Key": f"{plan.number}/{number}"},
        )
        note(answers, f"{text} {completion.choices[0].message.content}")


async def plain_interview(lab: Lab, model: "Endpoint") -> Evidence:
    plan, answers, gate = Plan(f"{lab.id}-plain", QUESTIONS), lab.file("plain"), lab.gate("plain")
    async with lab.process(interview_plainly, model, plan, answers, gate) as program:
        await until(lambda: len(notes(answers)) == 2, "two questions are answered")
        await program.kill()
    open_gate(gate)
    async with lab.process(interview_plainly, model, plan, answers, gate) as program:
        await program.wait()
    seen = [call.prompt for call in model.calls(plan.number)] if model.local else []
    return control(
        "a plain program that is killed between two calls puts its first questions again",
        answers=equal(len(notes(answers)), 5),
        **({"calls_the_model_saw": equal(seen, [*QUESTIONS[:2], *QUESTIONS])} if model.local else {}),
    )


class Unmapped:
    """The control: it maps no error, so that every one is retried."""

    def __init__(self, llm: Llm) -> None:
        self.llm = llm

    @activity.defn(name="ask")
    async def ask(self, question: Question) -> Answer:
        await self.llm.client.chat.completions.create(
            model=self.llm.model,
            messages=[{"role": "user", "content": question.text}],
            extra_headers={"Idempotency-Key": question.key},
        )
        return Answer("", 0)


# What is wrong with the model: how many calls it takes, and what comes of it.
TRIALS = {
    "429:1": (2, "COMPLETED"),
    "429-date:1": (2, "COMPLETED"),
    "500:2": (3, "COMPLETED"),
    "malformed:1": (2, "COMPLETED"),
    "drop:1": (2, "COMPLETED"),
    "slow:1": (2, "COMPLETED"),
    "400:9": (1, "FAILED: the model refused with HTTP 400"),
    "401:9": (1, "FAILED: the model refused with HTTP 401"),
}
CLAIMS = {
    "busy": "429: the next call comes when Retry-After says, not before",
    "busy until a date": "429: Retry-After may be a date as well",
    "broken": "500, a malformed answer, a dropped connection and a slow answer are retried until there is an answer",
    "hopeless": "400 and 401 are not retried, and the workflow learns why",
    "patience": "the client gives up before the activity's own timeout, so that the failure says what was wrong",
}
VAIN = "an unmapped 400 is retried in vain, as often as the policy allows"


async def patience_and_failure(call: Handle) -> tuple[float, Failure]:
    """How long, in seconds, the first activity of a run may take, and how its attempt before the last ended."""
    # By their kind and not by their place: a workflow task that is given out twice shifts all that follows.
    events = (await call.fetch_history()).events
    scheduled = next(one for one in events if one.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
    started = next(one for one in events if one.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_STARTED)
    timeout = scheduled.activity_task_scheduled_event_attributes.start_to_close_timeout.ToTimedelta()
    return timeout.total_seconds(), started.activity_task_started_event_attributes.last_failure


async def bad_models(lab: Lab, model: "Endpoint") -> list[Evidence]:
    if not model.local:
        unseen = [not_run("holds", claim, UNSEEN) for claim in CLAIMS.values()]
        return [*unseen, not_run("control", VAIN, UNSEEN)]

    async def trial(fault: str, variant: str = "") -> tuple[Handle, Ending, list[Heard]]:
        number = f"{lab.id}{variant}@{fault}"
        queue = f"{lab.id}{variant or '-hasty' * (fault == 'slow:1')}"
        handle = await lab.start(Interview.run, Plan(number, QUESTIONS[:1]), id=number, task_queue=queue)
        return handle, await ended(handle), model.calls(number)

    unmapped, impatient = Unmapped(model.llm()), model.llm(seconds=slowness())
    async with (
        lab.worker(**asking(model)),
        # Only who asks the slow one is to lose patience with the model.
        lab.worker(**asking(model, activities=[impatient.ask], task_queue=f"{lab.id}-hasty")),
        lab.worker(**asking(model, activities=[unmapped.ask], task_queue=f"{lab.id}-unmapped")),
    ):
        *trials, vain = await together(*map(trial, TRIALS), trial("400:9", "-unmapped"))
    seen = {fault: (calls, str(how)) for fault, (_, how, calls) in zip(TRIALS, trials, strict=True)}
    counted = {fault: [len(calls), how] for fault, (calls, how) in seen.items()}
    wanted = {fault: list(trial) for fault, trial in TRIALS.items()}
    handles = {fault: handle for fault, (handle, _, _) in zip(TRIALS, trials, strict=True)}

    async def waited(what: str, fault: str) -> Evidence:
        first, second = seen[fault][0][:2]
        _, failure = await patience_and_failure(handles[fault])
        asked = failure.application_failure_info.next_retry_delay.ToTimedelta().total_seconds()
        return holds(
            CLAIMS[what],
            calls=equal(counted[fault], wanted[fault]),
            retry_after=first.retry_after,
            # The header counts from when it was sent, the failure from when it was read.
            the_failure_asks_for=between(asked, 0.001, math.ceil(first.again - first.at)),
            comes_too_early_by=at_most(figure(max(first.again - second.at, 0), "s"), 0),
            after=figure(second.at - first.at, "s"),
            without_it_after_a_500=figure(seen["500:2"][0][1].at - seen["500:2"][0][0].at, "s"),
        )

    mended = [fault for fault in TRIALS if TRIALS[fault][1] == "COMPLETED" and not fault.startswith("429")]
    patience, failure = await patience_and_failure(handles["slow:1"])
    given_up = float(str(model_client(api_key="none").timeout))
    return [
        await waited("busy", "429:1"),
        await waited("busy until a date", "429-date:1"),
        holds(CLAIMS["broken"], **{fault.partition(":")[0]: equal(counted[fault], wanted[fault]) for fault in mended}),
        holds(
            CLAIMS["hopeless"], **{f"HTTP_{one[:3]}": equal(counted[one], wanted[one]) for one in ("400:9", "401:9")}
        ),
        holds(
            CLAIMS["patience"],
            the_client_s=figure(given_up, "s"),
            the_activity_s=at_least(figure(patience, "s"), given_up + 1),
            a_slow_answer=equal(failure.message, "Request timed out."),
        ),
        control(
            VAIN,
            calls=equal(len(vain[2]), 6),
            ended=contains(str(vain[1]), "FAILED", "400"),
        ),
    ]


@workflow.defn
class KeyedByIds:
    """The control: the same interview, with keys that are made of the ids of the workflow and its activities."""

    @workflow.run
    async def run(self, plan: Plan) -> None:
        for number, text in enumerate(plan.questions, 1):
            await put(Question(f"{workflow.info().workflow_id}/{number}", text))


async def keys(lab: Lab, model: "Endpoint") -> list[Evidence]:
    """Two interviews under one workflow id. The model refuses each first call."""
    claim = "every attempt of a call carries the same idempotency key, and every call one of its own, in any run"
    again = "a key made of the ids of workflow and activity comes again in a later run, for another question"
    if not model.local:
        return [not_run("holds", claim, UNSEEN), not_run("control", again, UNSEEN)]
    seen: dict[str, list[Heard]] = {}
    async with lab.worker(**asking(model, workflows=[Interview, KeyedByIds], task_queue=f"{lab.id}-keys")):
        for kind in (Interview, KeyedByIds):
            id = f"{lab.id}-{kind.__name__}@500:1"
            for which in ("first", "second"):
                plan = Plan(f"{id}/{which}", [f"{text} ({which})" for text in QUESTIONS])
                await ended(await lab.start(kind.__name__, plan, id=id, task_queue=f"{lab.id}-keys"))
            seen[kind.__name__] = model.calls(id)

    def prompts(kind: type) -> dict[str, set[str]]:
        calls = seen[kind.__name__]
        return {key: {call.prompt for call in calls if call.key == key} for key in {call.key for call in calls}}

    own, shared = prompts(Interview), prompts(KeyedByIds)
    attempts = Counter(call.key for call in seen["Interview"])
    return [
        holds(
            claim,
            questions=2 * len(QUESTIONS),
            keys=equal(len(own), 2 * len(QUESTIONS)),
            calls_under_each=equal(sorted(attempts.values()), [2] * 2 * len(QUESTIONS)),
            questions_under_each=equal(sorted(map(len, own.values())), [1] * 2 * len(QUESTIONS)),
        ),
        control(
            again,
            questions=2 * len(QUESTIONS),
            keys=equal(len(shared), len(QUESTIONS)),
            questions_under_each=equal(sorted(map(len, shared.values())), [2] * len(QUESTIONS)),
        ),
    ]


@workflow.defn
class CallsModel:
    """The control: workflow code that calls the model itself."""

    @workflow.run
    async def run(self, url: str, model: str, by: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello?"}]}
        if by == "httpx2":
            return httpx2.post(f"{url}/chat/completions", json=body).text
        with urllib.request.urlopen(f"{url}/chat/completions", json.dumps(body).encode()) as response:
            return str(response.read())


async def call_from_workflow(lab: Lab, model: "Endpoint") -> list[Evidence]:
    through = "a call made in workflow code by a library that is passed through is made, and made again by each replay"
    names = [f"{lab.id}-direct@{by}" for by in ("urllib", "httpx2")]
    url = model.url if model.local else "http://127.0.0.1:9"  # no call is to reach a paid model

    async def begin(name: str) -> Handle:
        # Only the first attempt of a workflow task tells the history why it failed: it must not time out.
        arguments, patience = (url, name, name.partition("@")[2]), timedelta(seconds=30)
        return await lab.start(
            CallsModel.run, *arguments, id=name, task_queue=f"{lab.id}-direct", task_timeout=patience
        )

    async with lab.worker([CallsModel], task_queue=f"{lab.id}-direct"):
        refused = await begin(names[0])
        await until(lambda: failed_tasks(refused), "the workflow task failed")
        made = await begin(names[1]) if model.local else None
        if made:
            await ended(made)
    arrived = {"calls_that_reached_the_model": equal(len(model.calls(names[0])), 0)} if model.local else {}
    guarded = control(
        "a call made in workflow code by what is not passed through the sandbox is refused there",
        urllib=contains((await failed_tasks(refused))[0], "Cannot access urllib"),
        **arrived,
    )
    if made is None:
        return [guarded, not_run("control", through, UNSEEN)]
    before = len(model.calls(names[1]))
    await replay(CallsModel, [await made.fetch_history()])
    again = len(model.calls(names[1])) - before
    return [guarded, control(through, calls=at_least(before, 1), calls_by_a_replay=at_least(again, 1))]


async def kill_inside_call(lab: Lab, model: "Endpoint") -> Evidence:
    claim = "a worker killed inside a call calls again: the model answers, and bills, twice"
    if not model.local:
        return not_run("limit", claim, UNSEEN)
    plan, gate = Plan(f"{lab.id}-inside", QUESTIONS[:1]), lab.gate("inside")
    taken = await lab.take_over(
        Interview.run, plan, name="inside",
        parts=asking(model, faults=[withhold("ask", gate)], shortened=shortened("ask", missed=soon())),
        point=lambda: lab.calls(f"{lab.id}-inside", "ended"),
        meanwhile=lambda: open_gate(gate),
    )  # fmt: skip
    calls = model.calls(plan.number)
    return limit(
        claim,
        calls_for_one_question=at_least(len(calls), 2),
        ended=equal(taken.ending.status, "COMPLETED"),
        idempotency_keys_which_only_help_where_they_are_heeded=equal(len({call.key for call in calls}), 1),
    )


@AI.item("AI-01", "LLM call as activity", seconds=150)
async def call_as_activity(lab: Lab) -> AsyncIterator[Evidence]:
    """Workers die between and inside calls, and the model fails in eight ways; the model counts its calls."""
    async with an_endpoint(lab) as model:
        parts = (kill_between_calls, kill_inside_call, bad_models, plain_interview, keys, call_from_workflow)
        async for evidence in side_by_side(*(part(lab, model) for part in parts)):
            yield evidence
    yield native(
        "remembering answers and retrying are the SDK's; telling hopeless errors from others is the user's",
        workflow.execute_activity_method,
        (workflow.execute_activity_method, "retry_policy"),
        (workflow.execute_activity_method, "heartbeat_timeout"),
        (workflow.execute_activity_method, "start_to_close_timeout"),
        (RetryPolicy, "maximum_attempts"),
        activity.heartbeat,
        (ApplicationError, "next_retry_delay"),
        (ApplicationError, "non_retryable"),
        adds=[*keywords_in([Llm], "except"), "Retry-After", "the key of a call"],
    )


# AI-02 Non-determinism -------------------------------------------------------------------------------
# A model may answer as it likes: what the workflow acts on is the answer in its history. An answer is input from
# outside, so it is validated. Prompts are code, and change under running agents as code does.


class Decision(BaseModel):
    action: Literal["refund", "replace", "escalate"]
    pieces: PositiveInt


@dataclass
class Case:
    number: str
    letter: str


class Shelf(Protocol):
    def do(self, key: str, what: str) -> None:
        """What is asked for twice under one key is done once."""


class Desk:
    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    @activity.defn
    def refund(self, case: Case) -> None:
        self.shelf.do(f"{case.number}/refund", "refund")

    @activity.defn
    def replace(self, case: Case) -> None:
        self.shelf.do(f"{case.number}/replace", "replace")

    @activity.defn
    def escalate(self, case: Case) -> None:
        self.shelf.do(f"{case.number}/escalate", "escalate")


OLD = ("gpt-4o-mini", "Be brief.")
NEW = ("", "Be kind and thorough.")  # and the model that the worker has now


@workflow.defn
class Complaint:
    """Decides on a complaint, acts, and answers what the customer then writes."""

    def __init__(self) -> None:
        self.reply = ""

    @workflow.run
    async def run(self, case: Case) -> str:
        model, manner = self.ways()
        decision = await self.decide(case, model, manner)
        await workflow.execute_activity(decision.action, case, start_to_close_timeout=timedelta(minutes=1))
        await workflow.wait_condition(lambda: self.reply != "")
        text = f"{manner} Answer this letter: {self.reply}"
        return (await put(Question(f"{case.number}/letter", text, model))).text

    def ways(self) -> tuple[str, str]:
        """Who began with the old prompt and model keeps them until the end."""
        return NEW if workflow.patched("kind-prompt") else OLD

    async def decide(self, case: Case, model: str, manner: str) -> Decision:
        prompt = f"{manner} What is to be done about this complaint, and for how many pieces? {case.letter}"
        refused = ""
        for n in range(1, 4):
            question = Question(f"{case.number}/decision {n}", prompt + refused, model, Decision.model_json_schema())
            try:
                return Decision.model_validate_json((await put(question)).text)
            except ValidationError as error:
                refused = f" Your last answer was refused: {error.errors()[0]['msg']}"
        raise ApplicationError("no valid answer in three tries", type="InvalidAnswer", non_retryable=True)

    @workflow.signal
    def write(self, reply: str) -> None:
        self.reply = reply


class Printed:
    """A shelf for the example."""

    def do(self, key: str, what: str) -> None:
        print(f"To be done: {what}")


async def example_ai_02(client: Client) -> None:
    desk = Desk(Printed())
    replies = [{"content": text} for text in ("Replace it!", '{"action": "replace", "pieces": 2}', "You are welcome.")]
    async with Worker(
        client,
        task_queue="complaints",
        workflows=[Complaint],
        activities=[Llm(rehearsed(*replies), "gpt-5-mini").ask, desk.refund, desk.replace, desk.escalate],
        activity_executor=ThreadPoolExecutor(10),
    ):
        case = Case(str(uuid.uuid4()), "Both mugs arrived broken.")
        handle = await client.start_workflow(
            Complaint.run, case, id=f"complaint-{case.number}", task_queue="complaints"
        )
        await handle.signal(Complaint.write, "Thank you!")
        print(await handle.result())


# AI-02 put to the test -------------------------------------------------------------------------------

LETTER = "My 2 mugs of the kind 'red mug' arrived broken."
CASES = 8


class Done:
    """A shelf that keeps its account in a file outside Temporal."""

    def __init__(self, path: str) -> None:
        self.path = path

    def do(self, key: str, what: str) -> None:
        note(self.path, f"{key} {what}")


TOSSED: dict[str, str] = {}  # what RawChance decided when its code ran last


@workflow.defn(sandboxed=False)
class RawChance(Complaint):
    """The control: the same branches on randomness of its own, which only works without the sandbox."""

    @workflow.run
    async def run(self, case: Case) -> str:
        return await super().run(case)

    async def decide(self, case: Case, model: str, manner: str) -> Decision:
        action = secrets.choice(["refund", "replace", "escalate"])
        TOSSED[case.number] = action
        return Decision.model_validate({"action": action, "pieces": 1})


@workflow.defn(name="Complaint")
class ComplaintBefore(Complaint):
    """The code of before: one prompt, one model."""

    @workflow.run
    async def run(self, case: Case) -> str:
        return await super().run(case)

    def ways(self) -> tuple[str, str]:
        return OLD


@workflow.defn(name="Complaint")
class ComplaintChanged(Complaint):
    """The same change without the guard."""

    @workflow.run
    async def run(self, case: Case) -> str:
        return await super().run(case)

    def ways(self) -> tuple[str, str]:
        return NEW


async def replay(kind: type, histories: Sequence[WorkflowHistory]) -> list[BaseException | None]:
    """Replay histories against a workflow's code. Returns what is wrong with each, or None when it fits."""

    async def each() -> AsyncIterator[WorkflowHistory]:
        for history in histories:
            yield history

    replayer = Replayer(workflows=[kind], workflow_runner=sandbox())
    async with asyncio.timeout(60 * slowness()):
        found = await replayer.replay_workflows(each(), raise_on_replay_failure=False)
    return [found.replay_failures.get(history.run_id) for history in histories]


def deciding(lab: Lab, model: "Endpoint", *kinds: type, **options: Any) -> dict[str, Any]:
    """The arguments of a worker for complaints."""
    desk = Desk(Done(lab.file("done")))
    activities = [model.llm().ask, desk.refund, desk.replace, desk.escalate]
    return {"workflows": kinds, "activities": activities, "shortened": shortened("ask"), **PROMPT} | options


async def ended_or_stuck(handle: Handle) -> None:
    """For one that decides anew each time: where a busy worker lost its place, it meets a replay of its own."""
    await until(functools.partial(is_closed_or_stuck, handle), f"{handle.id} is finished or stuck")
    await end(handle)


async def decide(
    lab: Lab, kind: type, over: Callable[[Handle], Awaitable[object]] = ended
) -> tuple[list[WorkflowHistory], list[BaseException | None]]:
    """Run some cases until they are `over`, and replay them. Returns the histories, and what is wrong with each."""
    name = kind.__name__
    handles = [
        await lab.start(name, Case(f"{lab.id}-{name}-case{n}", LETTER), name=f"{name}-{n}", start_signal="write",
                        start_signal_args=["Thanks."])
        for n in range(CASES)
    ]  # fmt: skip
    await asyncio.gather(*(over(handle) for handle in handles))
    histories = [await handle.fetch_history() for handle in handles]
    return histories, await replay(kind, histories)


def deeds(lab: Lab, kind: type) -> list[str]:
    """What was done for the cases of a kind, in their order."""
    return [line.split()[1] for line in sorted(notes(lab.file("done"))) if f"-{kind.__name__}-case" in line]


async def model_decides(lab: Lab, model: "Endpoint") -> Evidence:
    number = f"{lab.id}-Complaint-case"
    _, failures = await decide(lab, Complaint)
    kinds = dict(Counter(deeds(lab, Complaint)))
    facts = {"model_calls": equal(len(model.calls(number)), 2 * CASES)} if model.local else {}
    facts |= {"different_decisions": at_least(len(kinds), 2)} if model.local else {}
    return works(
        "on replay the workflow decides as the model did at first, and the model is not called",
        runs_of_one_prompt=CASES,
        decisions=kinds,
        replays_that_decide_otherwise=equal([str(one) for one in failures if one], []),
        activities_that_acted=equal(sum(kinds.values()), CASES),
        **facts,
    )


async def raw_chance(lab: Lab, model: "Endpoint") -> Evidence:
    """A replay that decides otherwise must be found out; one that happens to decide the same fits."""
    histories, failures = await decide(lab, RawChance, ended_or_stuck)
    replayed = [TOSSED[f"{lab.id}-RawChance-case{n}"] for n in range(CASES)]
    # By what the history has, and not by what was tossed first: a workflow task may be given out twice.
    differ = [
        f"ActivityTaskScheduled {deed}\n" not in outline(history)
        for deed, history in zip(replayed, histories, strict=True)
    ]
    found = [isinstance(failure, workflow.NondeterminismError) for failure in failures]
    return control(
        "a workflow that branches on raw randomness: a replay that decides otherwise is a NondeterminismError",
        replays=len(histories),
        that_decided_otherwise=at_least(sum(differ), 1),
        found_out=equal(found, differ),
    )


async def change_prompt(lab: Lab, model: "Endpoint", kind: type) -> tuple[list[list[str]], Handle]:
    """Deploy `kind` under a running complaint. Returns what it and a new one asked of which model, and the first."""
    queue = f"{lab.id}-{kind.__name__}-deployed"
    numbers = [f"{queue}-running", f"{queue}-later"]

    async def begin(number: str) -> Handle:
        return await lab.start("Complaint", Case(number, LETTER), id=number, task_queue=queue, task_timeout=soon())

    async with lab.worker(**deciding(lab, model, ComplaintBefore, task_queue=queue)):
        running = await begin(numbers[0])
        await until(lambda: lab.calls(running.id, "ended")[1:], "it has decided and acted")
    async with lab.worker(**deciding(lab, model, kind, task_queue=queue)):
        for handle in (running, await begin(numbers[1])):
            await handle.signal("write", "Thanks.")
            await ended(handle)
    ways = [[f"{call.model}: {call.prompt.partition('.')[0]}" for call in model.calls(number)] for number in numbers]
    return ways, running


GUARDED = "prompt and model changed under a running agent behind patched(): it ends as it began, new ones get the new"
MIXED = "a prompt or model changed in the same activity goes unnoticed: one agent mixes both"


async def prompts_change(lab: Lab, model: "Endpoint") -> list[Evidence]:
    if not model.local:
        return [not_run("holds", GUARDED, UNSEEN), not_run("limit", MIXED, UNSEEN)]
    old, new = f"{OLD[0]}: Be brief", f"{model.name}: Be kind and thorough"
    ((kept, later), guarded), ((mixed, _), changed) = await together(
        change_prompt(lab, model, Complaint), change_prompt(lab, model, ComplaintChanged)
    )
    return [
        holds(
            GUARDED,
            running_agent=equal(kept, [old, old]),
            new_agent=equal(later, [new, new]),
            failed_workflow_tasks=equal(await failed_tasks(guarded), []),
        ),
        limit(
            MIXED,
            one_agent=equal(mixed, [old, new]),
            failed_workflow_tasks=equal(await failed_tasks(changed), []),
        ),
    ]


async def structured(lab: Lab, model: "Endpoint") -> Evidence:
    claim = "a structured answer is validated by pydantic; an invalid one is asked for again with the error"
    if not model.local:
        return not_run("holds", claim, UNSEEN)
    numbers = [f"{lab.id}-structured@{fault}:99" for fault in ("mending", "invalid")]
    thanks: dict[str, Any] = {"start_signal": "write", "start_signal_args": ["Thanks."]}
    mending, never = [await lab.start("Complaint", Case(number, LETTER), id=number, **thanks) for number in numbers]
    how, refused = await asyncio.gather(ended(mending), ended(never))
    prompts = [call.prompt.partition(LETTER)[2].strip() for call in model.calls(f"{numbers[0]}/decision")]
    prompts += ["nothing"] * (3 - len(prompts))
    return holds(
        claim,
        calls=equal(len(model.calls(f"{numbers[0]}/decision")), 3),
        said_with_the_first=equal(prompts[0], ""),
        with_the_second=contains(prompts[1], "refused: Invalid JSON"),
        with_the_third=contains(prompts[2], "refused: Input should be a valid integer"),
        then=equal([how.status, len(lab.calls(mending.id, "ended"))], ["COMPLETED", 5]),
        never_valid=equal([len(model.calls(numbers[1])), str(refused)], [3, "FAILED: no valid answer in three tries"]),
        acted_without_one=equal(sorted({call.activity for call in lab.calls(never.id)}), ["ask"]),
    )


@AI.item("AI-02", "Non-determinism", seconds=150)
async def non_determinism(lab: Lab) -> AsyncIterator[Evidence]:
    """A model that answers at random decides; prompts, models and answers change under running agents."""
    async with an_endpoint(lab) as model, lab.worker(**deciding(lab, model, Complaint, RawChance)):
        parts = (raw_chance, prompts_change, structured, model_decides)
        async for evidence in side_by_side(*(part(lab, model) for part in parts)):
            yield evidence
    yield native(
        "recorded decisions and guarded changes are the SDK's; validating answers is the user's",
        workflow.execute_activity,
        workflow.execute_activity_method,
        workflow.patched,
        workflow.NondeterminismError,
        Replayer.replay_workflows,
        WorkflowHandle.fetch_history,
        adds=keywords_in([Complaint], "except"),
    )


# AI-03 Human in the loop -----------------------------------------------------------------------------
# A person is the slowest tool of an agent. The workflow waits for days as for seconds, and refuses what it must before
# anything is written down. A run answers ten updates at a time and two thousand in all: an agent that many people talk
# to only takes their messages into a queue, and continues as new.

APPROVERS = ("ana", "ben")
MINUTE = timedelta(minutes=1)


@dataclass
class Refund:
    number: str
    patience: float = 3 * 86400  # seconds until it goes to someone else


@dataclass
class Word:
    by: str
    approve: bool
    amount: int

    def outcome(self) -> str:
        return f"paid {self.amount}" if self.approve else "declined"


@dataclass
class Message:
    number: str
    text: str


class Office(Protocol):
    def enter(self, number: str, text: str) -> None:
        """What is entered twice under one number counts once."""


class Clerk:
    def __init__(self, office: Office) -> None:
        self.office = office

    @activity.defn
    def settle(self, outcome: Message) -> None:
        self.office.enter(outcome.number, outcome.text)


async def settle(number: str, text: str) -> None:
    await workflow.execute_activity_method(Clerk.settle, Message(number, text), start_to_close_timeout=MINUTE)


@workflow.defn
class Approval:
    """Has a model draft a refund, and pays when a person approves of it in time. One run a request."""

    def __init__(self) -> None:
        self.outcome = ""

    @workflow.run
    async def run(self, refund: Refund) -> str:
        await put(Question(f"{refund.number}/draft", "Draft a refund request of one sentence."))
        try:
            await workflow.wait_condition(lambda: self.outcome != "", timeout=refund.patience)
        except TimeoutError:
            self.outcome = self.outcome or "escalated"
        await settle(refund.number, self.outcome)
        await workflow.wait_condition(workflow.all_handlers_finished)
        return self.outcome

    @workflow.update
    def decide(self, word: Word) -> str:
        self.outcome = word.outcome()
        return f"{self.outcome}, as {word.by} said"

    @decide.validator
    def check(self, word: Word) -> None:
        """Runs before the update is accepted: what it refuses leaves no trace in the history."""
        if self.outcome:
            raise ApplicationError(f"it is {self.outcome} already")
        if word.by not in APPROVERS:
            raise ApplicationError(f"{word.by} may not decide this")
        if word.amount <= 0:
            raise ApplicationError("the amount must be positive")

    @workflow.signal
    def decide_later(self, word: Word) -> None:
        # A signal cannot refuse: whoever sent it is gone. It can only be ignored.
        if word.by in APPROVERS and not self.outcome:
            self.outcome = word.outcome()


@dataclass
class Inbox:
    """What an assistant takes along into its next run."""

    queue: list[Message] = field(default_factory=list)
    closed: bool = False


@workflow.defn
class Assistant:
    """Many people talk to it. An update only takes a message; the answer goes out by an activity."""

    @workflow.init
    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox

    @workflow.run
    async def run(self, inbox: Inbox) -> None:
        while (self.inbox.queue or not self.inbox.closed) and not self.is_long():
            await workflow.wait_condition(lambda: bool(self.inbox.queue) or self.inbox.closed or self.is_long())
            if self.inbox.queue:
                await self.answer(self.inbox.queue[0])
                del self.inbox.queue[0]
        await workflow.wait_condition(workflow.all_handlers_finished)
        if self.inbox.queue or not self.inbox.closed:
            workflow.continue_as_new(self.inbox)

    async def answer(self, message: Message) -> None:
        try:
            text = (await put(Question(message.number, message.text))).text
        except ActivityError as error:  # of one message, which must not be the end of the others
            text = f"there is no answer: {error.cause}"
        await settle(message.number, text)

    def is_long(self) -> bool:
        """The server suggests it before a run's updates, or its events, are too many."""
        return workflow.info().is_continue_as_new_suggested()

    @workflow.update
    async def bring(self, message: Message) -> int:
        """Returns how many are before this one."""
        self.inbox.queue.append(message)
        return len(self.inbox.queue) - 1

    @workflow.signal
    def close(self) -> None:
        self.inbox.closed = True


class Paper:
    """An office for the example."""

    def enter(self, number: str, text: str) -> None:
        print(f"{number}: {text}")


async def example_ai_03(client: Client) -> None:
    llm, clerk = Llm(rehearsed({"content": "Please refund it."}, {"content": "Hello!"}), "gpt-5-mini"), Clerk(Paper())
    async with Worker(
        client,
        task_queue="approvals",
        workflows=[Approval, Assistant],
        activities=[llm.ask, clerk.settle],
        activity_executor=ThreadPoolExecutor(10),
    ):
        number = str(uuid.uuid4())
        approval = await client.start_workflow(
            Approval.run, Refund(number), id=f"refund-{number}", task_queue="approvals"
        )
        # The id is what makes it safe to send it again, when no answer came.
        print(await approval.execute_update(Approval.decide, Word("ana", True, 20), id="ana-1"))
        await approval.result()
        chat = await client.start_workflow(Assistant.run, Inbox(), id=f"assistant-{number}", task_queue="approvals")
        await chat.execute_update(Assistant.bring, Message("message 1", "Hello?"))
        await chat.signal(Assistant.close)
        await chat.result()


# AI-03 put to the test -------------------------------------------------------------------------------

YES = Word("ana", True, 20)


class Ledger:
    """An office whose books are a file outside Temporal."""

    def __init__(self, path: str) -> None:
        self.path = path

    def enter(self, number: str, text: str) -> None:
        note(self.path, f"{number}: {text}")


@workflow.defn
class Answers(Assistant):
    """The control: an assistant whose updates wait for the model's answer."""

    @workflow.run
    async def run(self, inbox: Inbox) -> None:
        await super().run(inbox)

    @workflow.update
    async def bring(self, message: Message) -> int:  # type: ignore[override]
        await put(Question(message.number, message.text))
        return 0


@workflow.defn
class Stays(Assistant):
    """The control: an assistant that never continues as new."""

    @workflow.run
    async def run(self, inbox: Inbox) -> None:
        await super().run(inbox)

    def is_long(self) -> bool:
        return False


class Bureau:
    """Where approvals and assistants are tried, and what was really done for them."""

    def __init__(self, lab: Lab, model: "Endpoint") -> None:
        self.lab, self.model, self.path = lab, model, lab.file("office")

    def parts(self, **options: Any) -> dict[str, Any]:
        """The arguments of a worker for approvals and assistants."""
        held = [
            hold("settle", self.lab.gate("settle")).of(f"{self.lab.id}-update"),
            hold("settle", self.lab.gate("late")).of(f"{self.lab.id}-expires"),
            hold("ask", self.lab.gate("ask")).of(f"{self.lab.id}-answers"),
            hold("ask", self.lab.gate("ask")).of(f"{self.lab.id}-queues"),
        ]
        activities = [self.model.llm().ask, Clerk(Ledger(self.path)).settle]
        return {
            "workflows": [Approval, Assistant, Answers, Stays],
            "activities": activities,
            "faults": held,
            "shortened": shortened("ask"),
            **PROMPT,
        } | options

    async def approval(self, name: str, patience: float = 3600, **options: Any) -> Handle:
        """Start an approval, and wait until it has heard of the draft, and waits for a person."""
        number = f"{self.lab.id}-{name}"
        handle = await self.lab.start(Approval.run, Refund(number, patience), id=number, **options)
        await until(lambda: happened(handle, "TIMER_STARTED"), "the request waits for a person", every=0.02)
        return handle

    def done(self, handle: Handle) -> list[str]:
        """What was really done in the end."""
        lines = [line.partition(": ") for line in notes(self.path)]
        return [text for number, _, text in lines if number.startswith(handle.id)]

    def drafts(self, handle: Handle) -> int:
        return len(self.lab.calls(handle.id, activity="ask"))


async def sent(update: Any) -> str:
    """The answer to an update, or why there is none."""
    try:
        async with asyncio.timeout(20 * slowness()):
            return await said(update)
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError):
        return "no answer"


async def by_update(bureau: Bureau) -> Evidence:
    handle = await bureau.approval("update")
    # On a busy machine the workflow tasks that asked the validator may be kept: outline() leaves them out.
    before = outline(await handle.fetch_history())
    bad = [Word("mallory", True, 20), Word("ana", True, -5)]
    refused = [await sent(handle.execute_update(Approval.decide, one)) for one in bad]
    after = outline(await handle.fetch_history())
    answer = await handle.execute_update(Approval.decide, YES)
    await until(lambda: bureau.lab.calls(handle.id, activity="settle"), "it is being paid")
    again = outline(await handle.fetch_history())
    refused.append(await sent(handle.execute_update(Approval.decide, Word("ben", False, 1))))
    at_last = outline(await handle.fetch_history())
    open_gate(bureau.lab.gate("settle"))
    how = await ended(handle)
    return works(
        "approved by update; its validator refuses unauthorised, bad and repeated ones, which leave no trace",
        refused=equal(
            refused, ["mallory may not decide this", "the amount must be positive", "it is paid 20 already"]
        ),
        events_that_tell_of_them=equal(
            [len(after.splitlines()) - len(before.splitlines()), len(at_last.splitlines()) - len(again.splitlines())],
            [0, 0],
        ),
        answer=equal(answer, "paid 20, as ana said"),
        updates_in_the_history=equal((await count_events(handle))["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"], 1),
        result=equal(how.result, "paid 20"),
        done=equal(bureau.done(handle), ["paid 20"]),
    )  # fmt: skip


async def by_signal(bureau: Bureau) -> Evidence:
    handle = await bureau.approval("signal")
    await handle.signal(Approval.decide_later, Word("mallory", True, 500))
    await handle.signal(Approval.decide_later, Word("ben", False, 20))
    how = await ended(handle)
    return works(
        "decided by signal; an unauthorised one has no effect",
        mallory_approves_500_and_ben_declines=equal(how.result, "declined"),
        done=equal(bureau.done(handle), ["declined"]),
    )


async def expires(bureau: Bureau) -> list[Evidence]:
    """Nobody decides in time, and then somebody does while it is being escalated."""
    handle = await bureau.lab.start(Approval.run, Refund(f"{bureau.lab.id}-expires", 1), name="expires")
    await until(lambda: bureau.lab.calls(handle.id, activity="settle"), "it is being escalated")
    late = await sent(handle.execute_update(Approval.decide, YES))
    open_gate(bureau.lab.gate("late"))
    how = await ended(handle)
    events = await history_of(handle)
    waited = event_times(events, "TIMER_FIRED")[0] - event_times(events, "TIMER_STARTED")[0]
    return [
        holds(
            "nobody decides: it is escalated, not before the time is over",
            after=at_least(figure(waited.total_seconds(), "s"), 1),
            result=equal(how.result, "escalated"),
            done=equal(bureau.done(handle), ["escalated"]),
        ),
        holds(
            "who decides when it is being escalated is told that it is too late",
            answer=equal(late, "it is escalated already"),
            done=equal(bureau.done(handle), ["escalated"]),
        ),
    ]


async def timed_out_client(bureau: Bureau) -> list[Evidence]:
    """The update is sent while no worker runs, and its sender loses patience."""
    queue = f"{bureau.lab.id}-late-queue"
    async with bureau.lab.worker(**bureau.parts(task_queue=queue)):
        handle = await bureau.approval("late", task_queue=queue)
    told = "an answer"
    try:
        async with asyncio.timeout(2):
            await handle.execute_update(Approval.decide, YES, id="ana-1")
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
        told = type(error).__name__
    async with bureau.lab.worker(**bureau.parts(task_queue=queue)):
        how = await ended(handle)
        again = await sent(handle.execute_update(Approval.decide, YES, id="ana-1"))
    accepted = (await count_events(handle))["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"]
    return [
        limit(
            "whoever sends an update and times out does not know that it will still be applied",
            the_client_got_after_2_s=differs(told, "an answer"),
            once_a_worker_was_there=equal(how.result, "paid 20"),
            done=equal(bureau.done(handle), ["paid 20"]),
        ),
        holds(
            "sent again with the same update id, it gives the answer that was missed, and is applied once",
            answer=equal(again, "paid 20, as ana said"),
            updates_in_the_history=equal(accepted, 1),
            done=equal(bureau.done(handle), ["paid 20"]),
        ),
    ]


async def wait_for_input(ledger: str, inbox: str) -> None:
    """The control: a program that waits for input keeps what it waits for in its memory."""
    waiting = secrets.token_hex(4)
    note(ledger, f"waiting {waiting}")
    await until(lambda: notes(inbox), "somebody approved")
    note(ledger, "paid" if notes(inbox)[0] == waiting else "no such request")


async def plain_process(bureau: Bureau) -> Evidence:
    ledger, inbox = bureau.lab.file("plain"), bureau.lab.file("inbox")
    async with bureau.lab.process(wait_for_input, ledger, inbox) as program:
        await until(lambda: notes(ledger), "the program waits")
        await program.kill()
    async with bureau.lab.process(wait_for_input, ledger, inbox) as program:
        await until(lambda: len(notes(ledger)) == 2, "the program waits again")
        note(inbox, notes(ledger)[0].removeprefix("waiting "))  # the person approves what they were shown
        await program.wait()
    return control(
        "a plain program that waits for input has lost the request after a kill",
        shown_to_a_person_then_killed_restarted_and_approved=equal(notes(ledger)[2:], ["no such request"]),
    )


CROWD = 12


async def in_crowds(bureau: Bureau) -> list[Evidence]:
    """More people than ten talk to an agent whose model takes its time."""
    answers, queues = [
        await bureau.lab.start(kind.run, Inbox(), name=name)
        for kind, name in ((Answers, "answers"), (Assistant, "queues"))
    ]
    # A client with the defaults sends again for ten seconds what is refused like this.
    impatient = await connect(bureau.lab.target, retry_config=RetryConfig(max_retries=1, max_elapsed_time_millis=1))
    direct: Handle = impatient.get_workflow_handle(answers.id)
    told = [await sent(accepted(direct, Message(f"{answers.id}/{n}", "Hello?"))) for n in range(CROWD)]
    messages = [Message(f"{queues.id}/{n}", "Hello?") for n in range(CROWD)]
    places = await asyncio.gather(*(sent(queues.execute_update(Assistant.bring, one)) for one in messages))
    by_then = bureau.done(queues)
    open_gate(bureau.lab.gate("ask"))
    for handle in (answers, queues):
        await handle.signal(Assistant.close)
        await ended(handle)
    return [
        limit(
            "an agent whose updates wait for the model's answer takes only so many at a time: others are refused",
            sent=CROWD,
            accepted=at_most(told.count("accepted"), CROWD - 1),
            others=equal([one for one in told if one != "accepted" and not one.startswith("RESOURCE_EXHAUSTED")], []),
            in_words=told[-1],
        ),
        holds(
            "an agent whose updates only take messages into a queue takes them all, and answers one after the other",
            sent_at_once=CROWD,
            places=equal(sorted(places, key=lambda place: (len(place), place)), [str(n) for n in range(CROWD)]),
            answered_by_then=equal(by_then, []),
            answered=equal(len(bureau.done(queues)), CROWD),
        ),
    ]


async def accepted(handle: Any, message: Message) -> str:
    await handle.start_update(Assistant.bring, message, wait_for_stage=WorkflowUpdateStage.ACCEPTED)
    return "accepted"


# Settings that no user has, so that the limit is met after few messages.
LOWERED = {
    "history.maxTotalUpdates": "12",  # 2000
    "history.maxTotalUpdates.suggestContinueAsNewThreshold": "0.5",  # 0.9
}
MESSAGES = 18
IN_ALL = "an agent that never continues as new takes only so many updates in all, and then refuses every one"
CONTINUED = "an agent that continues as new when it is suggested takes more: each message is answered once"
OUTLIVED = "waits over SIGKILL of worker and server: the decision then counts, and nothing was asked again"
RAN_OUT = "a request whose time ran out while all was down is escalated when it is up again"
RECORDED = "an update sent again under its id gives the recorded answer, whatever it says now"


@piece(limit(IN_ALL), holds(CONTINUED), holds(OUTLIVED), holds(RAN_OUT), holds(RECORDED))
async def on_a_server_of_its_own(bureau: Bureau) -> list[Evidence]:
    async with bureau.lab.private_server(file=True, settings=LOWERED) as server:
        async with bureau.lab.worker(**bureau.parts(server=server)):
            counted = await many_in_all(bureau, server)
        return [*counted, *await while_all_is_down(bureau, server)]


async def many_in_all(bureau: Bureau, server: Server) -> list[Evidence]:
    stays = await bureau.lab.start(Stays.run, Inbox(), name="stays", server=server)
    moves = await bureau.lab.start(Assistant.run, Inbox(), name="moves", server=server)
    told: list[list[str]] = [[], []]
    for handle, answers in zip((stays, moves), told, strict=True):
        for n in range(MESSAGES):
            answers.append(await sent(handle.execute_update(Assistant.bring, Message(f"{handle.id}/{n}", "Hello?"))))
    for handle in (stays, moves):
        await handle.signal(Assistant.close)
        await ended(handle)
    taken = [sum(answer.isdecimal() for answer in answers) for answers in told]
    lowered = "12 updates, and a new run is suggested after half of them, instead of 2000 and nine tenths"
    runs = {call.run for call in bureau.lab.calls(moves.id)}
    asked = [call.argument["key"] for call in bureau.lab.calls(moves.id, activity="ask")]
    return [
        limit(
            IN_ALL,
            server_set_to=lowered,
            taken=equal(taken[0], 12),
            then=contains(told[0][-1], "FAILED_PRECONDITION", "total number"),
            answered=equal(len(bureau.done(stays)), 12),
        ),
        holds(
            CONTINUED,
            server_set_to=lowered,
            taken=equal(taken[1], MESSAGES),
            answered=equal(len(bureau.done(moves)), MESSAGES),
            asked_twice=equal(repeated(asked), []),
            runs=at_least(len(runs), 2),
        ),
    ]


async def while_all_is_down(bureau: Bureau, server: Server) -> list[Evidence]:
    """Two requests wait; worker and server are killed, and one of the two expires before they are back."""
    queue, patience = f"{bureau.lab.id}-down", 4 * slowness()
    options: dict[str, Any] = {"server": server, "task_queue": queue, "task_timeout": soon()}
    async with bureau.lab.worker_process(**bureau.parts(server=server, task_queue=queue)) as worker:
        patient = await bureau.approval("patient", **options)
        hasty = await bureau.approval("hasty", patience, **options)
        out = event_times(await history_of(hasty), "TIMER_STARTED")[0].timestamp() + patience
        await worker.kill()
    server.kill()
    if time.time() > out:
        raise TimeoutError("the time of a request ran out before all was down")
    killed, early = time.monotonic(), bureau.done(hasty)
    await asyncio.sleep(out + 0.5 - time.time())  # time is the subject: it runs out while all is down
    await server.start()
    away = time.monotonic() - killed
    async with bureau.lab.worker_process(**bureau.parts(server=server, task_queue=queue)):
        escalated = await ended(hasty)
        answer = await sent(patient.execute_update(Approval.decide, YES, id="ana-1"))
        again = await sent(patient.execute_update(Approval.decide, Word("ben", False, 9), id="ana-1"))
        paid = await ended(patient)
    return [
        holds(
            OUTLIVED,
            both_down_for=figure(away, "s"),
            result=equal(paid.result, "paid 20"),
            done=equal(bureau.done(patient), ["paid 20"]),
            drafts_asked_for=equal([bureau.drafts(patient), bureau.drafts(hasty)], [1, 1]),
        ),
        holds(
            RAN_OUT,
            its_time=figure(patience, "s"),
            done_before=equal(early, []),
            result=equal(escalated.result, "escalated"),
            done=equal(bureau.done(hasty), ["escalated"]),
        ),
        holds(
            RECORDED,
            first=equal(answer, "paid 20, as ana said"),
            again_with_ben_declining=equal(again, answer),
            done=equal(bureau.done(patient), ["paid 20"]),
        ),
    ]


@AI.item("AI-03", "Human in the loop", seconds=150)
async def human_in_the_loop(lab: Lab) -> AsyncIterator[Evidence]:
    """People approve, refuse, come too late, in crowds and without a right to; workers and servers die meanwhile."""
    async with an_endpoint(lab) as model:
        bureau = Bureau(lab, model)
        parts = (on_a_server_of_its_own, timed_out_client, plain_process, by_update, by_signal, expires, in_crowds)
        async with lab.worker(**bureau.parts()):
            async for evidence in side_by_side(*(part(bureau) for part in parts)):
                yield evidence
    yield native(
        "waiting, refusing, expiring, queueing and going on in a new run are the SDK's",
        workflow.update,
        workflow.signal,
        workflow.init,
        (workflow.wait_condition, "timeout"),
        workflow.all_handlers_finished,
        workflow.continue_as_new,
        workflow.Info.is_continue_as_new_suggested,
        WorkflowHandle.signal,
        (WorkflowHandle.execute_update, "id"),
        WorkflowUpdateFailedError,
        WorkflowUpdateRPCTimeoutOrCancelledError,
    )


# AI-04 Streaming -------------------------------------------------------------------------------------
# A stream through the workflow is a preview of the answer, kept for whoever comes late. The answer itself is what the
# activity returns. An attempt that was cut off has published already, so the next one says: forget what came before.


@dataclass
class Piece:
    attempt: int
    index: int  # of the token, from 0; -1 begins the answer anew
    text: str


class Source(Protocol):
    def tokens(self, question: str) -> AsyncIterator[str]:
        """The tokens of a model's answer, as they come."""


class Speaker:
    def __init__(self, source: Source) -> None:
        self.source = source

    @activity.defn
    async def speak(self, question: str) -> str:
        """Publishes each token as it comes, and returns the whole."""
        attempt = activity.info().attempt
        stream = WorkflowStreamClient.from_within_activity(batch_interval=timedelta(milliseconds=50))
        pieces = stream.topic("answer", type=Piece)
        tokens: list[str] = []
        async with beating(), stream:
            pieces.publish(Piece(attempt, -1, ""))
            async for token in self.source.tokens(question):
                pieces.publish(Piece(attempt, len(tokens), token))
                tokens.append(token)
        return "".join(tokens)


@workflow.defn
class Streamed:
    @workflow.init
    def __init__(self, question: str) -> None:
        self.stream = WorkflowStream()

    @workflow.run
    async def run(self, question: str) -> str:
        return await workflow.execute_activity_method(
            Speaker.speak,
            question,
            start_to_close_timeout=timedelta(minutes=5),
            heartbeat_timeout=timedelta(seconds=10),
        )


async def follow(client: Client, workflow_id: str, offset: int = 0) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of an answer until its workflow ends, each with the offset behind it: where to come back to."""
    stream = WorkflowStreamClient.create(client, workflow_id)
    while True:
        try:
            async for item in stream.subscribe(
                "answer", offset, result_type=Piece, poll_cooldown=timedelta(milliseconds=20)
            ):
                offset = item.offset + 1
                yield offset, item.data
            return
        except RPCError as error:
            if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.PERMISSION_DENIED):
                raise
            await asyncio.sleep(0.1)  # not answered, as while no worker is there: go on from here


def text_of(pieces: Sequence[Piece]) -> str:
    """What a subscriber shows."""
    tokens: list[str] = []
    for one in pieces:
        tokens = [] if one.index < 0 else [*tokens, one.text]
    return "".join(tokens)


class Parrot:
    """A model for the example."""

    async def tokens(self, question: str) -> AsyncIterator[str]:
        for word in question.split():
            await asyncio.sleep(0.1)
            yield f"{word} "


async def example_ai_04(client: Client) -> None:
    async with Worker(client, task_queue="streams", workflows=[Streamed], activities=[Speaker(Parrot()).speak]):
        id = f"stream-{uuid.uuid4()}"
        handle = await client.start_workflow(Streamed.run, "Say this again.", id=id, task_queue="streams")
        async for offset, piece in follow(client, id):
            print(offset, piece.text)
        print(await handle.result())


# AI-04 put to the test -------------------------------------------------------------------------------

COUNTING = "Count from 1 to 40, in digits, with a comma behind each number. Write nothing else."


@dataclass(frozen=True)
class Tokens:
    """A model's answer, token by token. When each one came is noted."""

    model: "Endpoint"
    name: str
    heard: str

    async def tokens(self, question: str) -> AsyncIterator[str]:
        client = self.model.llm().client
        chunks = await client.chat.completions.create(
            model=self.name, messages=[{"role": "user", "content": question}], stream=True
        )
        async for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                note(self.heard, str(time.time()))
                yield chunk.choices[0].delta.content


@workflow.defn
class Polled:
    """The control: without a stream, there is nothing to see before the activity returns."""

    def __init__(self) -> None:
        self.text = ""
        self.seen = False

    @workflow.run
    async def run(self, question: str) -> str:
        self.text = await workflow.execute_activity("speak", question, start_to_close_timeout=timedelta(minutes=5))
        await workflow.wait_condition(lambda: self.seen)
        return self.text

    @workflow.query
    def so_far(self) -> str:
        return self.text

    @workflow.signal
    def enough(self) -> None:
        self.seen = True


class Silent(Speaker):
    """The control's activity: it publishes nothing."""

    @activity.defn(name="speak")
    async def speak_at_once(self, question: str) -> str:
        return "".join([token async for token in self.source.tokens(question)])


class Stand:
    """A streamed answer, its subscribers, and when the model said what."""

    def __init__(self, lab: Lab, model: "Endpoint", name: str) -> None:
        self.lab, self.model, self.id, self.heard = lab, model, f"{lab.id}-{name}", lab.file(f"{name}-heard")
        self.source = Tokens(model, model.named(f"pause:1/{name}"), self.heard)
        self.gate = model.gate(name)

    def parts(self, **options: Any) -> dict[str, Any]:
        """The arguments of a worker for streams."""
        speaker, silent = Speaker(self.source), Silent(self.source)
        activities = [silent.speak_at_once] if options.get("workflows") == [Polled] else [speaker.speak]
        shorter = {"speak": {"heartbeat_timeout": soon()}}
        parts = {"workflows": [Streamed], "activities": activities, "task_queue": self.id, "shortened": shorter}
        return parts | {**PROMPT} | options

    async def subscribe(self, seen: list["Seen"], offset: int = 0, enough: int = 10**6) -> None:
        """Collect the pieces until the answer ends, or until there are enough."""
        async with contextlib.aclosing(follow(self.lab.client, self.id, offset)) as pieces:  # type: ignore[type-var]
            async for offset, piece in pieces:
                seen.append(Seen(offset - 1, piece, time.time()))
                if len(seen) >= enough:
                    return


@dataclass(frozen=True)
class Seen:
    """A piece as a subscriber saw it."""

    offset: int
    piece: Piece
    at: float


def shown(seen: Sequence[Seen]) -> str:
    return text_of([one.piece for one in seen])


def places(seen: Sequence[Seen]) -> list[tuple[int, Piece]]:
    return [(one.offset, one.piece) for one in seen]


def tokens_in(seen: Sequence[Seen]) -> list[Seen]:
    return [one for one in seen if one.piece.index >= 0]


def gaps(seen: Sequence[Seen]) -> list[str]:
    """What is missing, twice or out of place: offsets, and the tokens of an attempt."""
    indexes = [(one.piece.attempt, one.piece.index) for one in seen]
    count = Counter(attempt for attempt, _ in indexes)
    wanted = [(attempt, index) for attempt in sorted(count) for index in range(-1, count[attempt] - 1)]
    found = [f"offset {one.offset} behind {n}" for n, one in enumerate(seen, seen[0].offset) if one.offset != n]
    return found + [f"token {place}" for place, right in zip(indexes, wanted, strict=True) if place != right]


PAUSE = 20  # so many tokens has the model said when it waits


async def streamed(lab: Lab, model: "Endpoint") -> list[Evidence]:
    """One subscriber from the start, one that is cut off and comes back, and one that comes after the end."""
    stand = Stand(lab, model, "stream")
    seen: list[Seen] = []
    broken: list[Seen] = []
    late: list[Seen] = []
    async with lab.worker(**stand.parts()):
        handle = await lab.start(Streamed.run, COUNTING, id=stand.id, task_queue=stand.id)
        subscriber = asyncio.create_task(stand.subscribe(seen))
        await stand.subscribe(broken, enough=10)
        before = len(broken)
        await until(lambda: len(tokens_in(seen)) >= PAUSE, "what the model has said is seen", every=0.02)
        early = len(tokens_in(seen))
        open_gate(stand.gate)
        await stand.subscribe(broken, offset=broken[-1].offset + 1)
        await subscriber
        how = await ended(handle)
        middle = len(seen) // 2
        await stand.subscribe(late, offset=middle)
    count = await count_events(handle)
    tokens = tokens_in(seen)
    delays = [one.at - float(heard) for one, heard in zip(tokens, notes(stand.heard), strict=False)]
    kept = {"signals": count["WORKFLOW_EXECUTION_SIGNALED"], "updates": count["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"]}
    return [
        works(
            "an outside subscriber gets the tokens through the workflow while they come: all of them, in order",
            tokens=equal(len(tokens), len(notes(stand.heard))),
            missing_or_out_of_place=equal(gaps(seen), []),
            seen_while_the_model_had_more_to_say=equal(early, PAUSE) if model.local else early,
            text=equal(shown(seen), how.result),
            from_the_model_to_sight=Spread.of([1000 * delay for delay in delays], "ms"),
        ),
        holds(
            "a subscriber that comes after the end catches up from an offset",
            from_offset=middle,
            pieces=len(late),
            equal_to_those_seen_live=equal(places(late) == places(seen)[middle:], True),
        ),
        holds(
            "a subscriber that was cut off reconnects behind its last offset: nothing missing, nothing twice",
            before=equal(before, 10),
            after=at_least(len(broken) - before, 1),
            missing_or_twice=equal(gaps(broken), []),
            text=equal(shown(broken), how.result),
        ),
        limit(
            "what is streamed costs history: each batch of tokens and each poll of a subscriber is kept",
            tokens=len(tokens),
            batches=at_least(kept["signals"], 2),
            polls=at_least(kept["updates"], 2),
            events=count.total(),
            events_a_token=round(count.total() / len(tokens), 1),
        ),
    ]  # fmt: skip


async def killed_in_stream(lab: Lab, model: "Endpoint") -> list[Evidence]:
    stand = Stand(lab, model, "killed")
    seen: list[Seen] = []

    async def subscribe() -> None:
        run = lab.client.get_workflow_handle(stand.id)
        await until(lambda: happened(run, "WORKFLOW_EXECUTION_STARTED"), "there is something to follow")
        await stand.subscribe(seen)

    subscriber = asyncio.create_task(subscribe())
    taken = await lab.take_over(
        Streamed.run, COUNTING, name="killed", parts=stand.parts(), task_timeout=soon(),
        point=lambda: len(seen) > 10 or subscriber.done(),
    )  # fmt: skip
    async with lab.worker(**stand.parts()):  # a subscriber that had not asked yet needs somebody to answer
        await asyncio.wait_for(subscriber, 60 * slowness())
    attempts = sorted({one.piece.attempt for one in seen})
    last = [one for one in seen if one.piece.attempt == attempts[-1]]
    twice = Counter(one.piece.index for one in seen if one.piece.index >= 0)
    return [
        holds(
            "worker killed in mid-stream: a marker tells the subscriber to begin anew, and the final text is right",
            killed_after_pieces=len(seen) - len(last),
            attempts_seen=equal(attempts, [1, 2]),
            ended=equal(taken.ending.status, "COMPLETED"),
            text=equal(shown(seen), taken.ending.result),
            missing_or_out_of_place=equal(gaps(last), []),
        ),
        limit(
            "the tokens of a killed attempt come again; without a marker of one's own the text would be wrong",
            tokens_that_came_twice=at_least(sum(count > 1 for count in twice.values()), 1),
            text_without_the_marker=differs("".join(one.piece.text for one in seen), taken.ending.result),
        ),
    ]


async def polled(lab: Lab, model: "Endpoint") -> Evidence:
    stand = Stand(lab, model, "polled")
    async with lab.worker(**stand.parts(workflows=[Polled])):
        handle = await lab.start(Polled.run, COUNTING, id=stand.id, task_queue=stand.id)
        await until(lambda: len(notes(stand.heard)) >= PAUSE, "the model has said something", every=0.02)
        shown_then, heard = await handle.query(Polled.so_far), len(notes(stand.heard))
        open_gate(stand.gate)
        text = ""

        async def there() -> bool:
            nonlocal text
            text = await handle.query(Polled.so_far)
            return text != ""

        await until(there, "there is something to see", every=0.02)
        at = time.time()
        await handle.signal(Polled.enough)
        how = await ended(handle)
    delays = [1000 * (at - float(line)) for line in notes(stand.heard)]
    return control(
        "without a stream, polling by query shows nothing until the whole answer is there",
        tokens_that_the_activity_had=at_least(heard, PAUSE),
        shown_then=equal(shown_then, ""),
        the_first_text_shown=equal(text, how.result),
        from_the_model_to_sight=Spread.of(delays, "ms"),
        events=(await count_events(handle)).total(),
    )


@AI.item("AI-04", "Streaming", seconds=150)
async def streaming(lab: Lab) -> AsyncIterator[Evidence]:
    """Tokens go from an activity through its workflow to subscribers who are early, late and cut off."""
    if importlib.util.find_spec("temporalio.contrib.workflow_streams") is None:
        raise NotRun(f"workflow streams exist since SDK 1.27, and this is {sdk_version()}")
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
# With an integration, each model call and each tool of an agent is an activity of its own, and a crash repeats none of
# them. A framework run whole inside one activity starts over, unless it keeps checkpoints of its own.


@dataclass
class Wish:
    product: str
    model: str


def errand(wish: Wish) -> str:
    return (
        f"Find out the stock of the product '{wish.product}', then reserve it. Call each tool exactly once, "
        "one after the other, and then report what the tools said."
    )


class Shop(Protocol):
    async def stock(self, product: str) -> str: ...

    async def reserve(self, product: str, key: str) -> str:
        """What is asked for twice under one key is reserved once."""


class Shopkeeper:
    """Tools, with what they need and a model must not see."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop

    @activity.defn
    async def stock(self, product: str) -> str:
        """How many pieces of a product are in stock."""
        return await self.shop.stock(product)

    @activity.defn
    async def reserve(self, product: str) -> str:
        """Reserve one piece of a product."""
        return await self.shop.reserve(product, f"{activity.info().workflow_id}/{product}")  # one id is one errand


@workflow.defn
class Shopper:
    """An agent of the OpenAI Agents SDK. Its runner is replaced by the plugin's, its tools are activities."""

    @workflow.run
    async def run(self, wish: Wish) -> str:
        with workflow.unsafe.imports_passed_through():  # here and not above: they take seconds
            from agents import Agent, Runner
            from temporalio.openai_agents.workflow import activity_as_tool

        tools = [
            activity_as_tool(tool, start_to_close_timeout=timedelta(seconds=30))
            for tool in (Shopkeeper.stock, Shopkeeper.reserve)
        ]
        agent = Agent(name="Shopper", instructions="You buy things.", model=wish.model, tools=list(tools))
        result = await Runner.run(agent, errand(wish))
        return str(result.final_output)


def agents_plugin(client: openai.AsyncOpenAI) -> Any:
    """The plugin for clients and workers. The model is asked by its activities, and so is retried by Temporal."""
    from agents import OpenAIProvider
    from temporalio.openai_agents import ModelActivityParameters, OpenAIAgentsPlugin

    return OpenAIAgentsPlugin(
        model_params=ModelActivityParameters(
            start_to_close_timeout=PATIENCE["start_to_close_timeout"], retry_policy=PATIENCE["retry_policy"]
        ),
        model_provider=OpenAIProvider(openai_client=client, use_responses=False),
    )


class Stall:
    """A shop for the example."""

    async def stock(self, product: str) -> str:
        return "7 in stock"

    async def reserve(self, product: str, key: str) -> str:
        return "reserved as R-1"


def calls_tool(name: str, arguments: str) -> dict[str, Any]:
    """A model that calls a tool."""
    return {"tool_calls": [{"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}]}


async def example_ai_05(client: Client) -> None:
    mug = '{"product": "mug"}'
    model = rehearsed(
        calls_tool("stock", mug),
        calls_tool("reserve", mug),
        {"content": "There were 7, and one is reserved as R-1."},
    )
    client = Client(client.service_client, namespace=client.namespace, plugins=[agents_plugin(model)])
    tools = Shopkeeper(Stall())
    async with Worker(client, task_queue="shop", workflows=[Shopper], activities=[tools.stock, tools.reserve]):
        wish = Wish("mug", "gpt-5-mini")
        print(await client.execute_workflow(Shopper.run, wish, id=f"shopper-{uuid.uuid4()}", task_queue="shop"))


# AI-05 put to the test -------------------------------------------------------------------------------
# The frameworks take seconds of imports: too much for each worker process, and for the nursery that the other items
# wait for. The processes of this item are forked from a nursery of its own, which has imported them.

FRAMEWORKS = {
    "temporalio.openai_agents": "OpenAI Agents SDK by Temporal's plugin (temporalio-openai-agents) needs SDK 1.33",
    "temporalio.langgraph": "LangGraph by Temporal's plugin (temporalio-langgraph) needs SDK 1.34",
    "pydantic_ai.durable_exec.temporal": "Pydantic AI by its own integration (pydantic-ai-slim) needs SDK 1.27",
}
OTHERS = ("langgraph.prebuilt", "langchain_openai", "pydantic_ai.models.openai")


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class Store:
    """A shop that notes what happens in it. Products bring trouble: a lamp kills who reserves it."""

    def __init__(self, ledger: str, gate: str) -> None:
        self.ledger, self.gate = ledger, gate

    async def stock(self, product: str) -> str:
        """How many pieces of a product are in stock."""
        note(self.ledger, f"stock {product}")
        return "7 in stock"

    async def reserve(self, product: str, key: str = "") -> str:
        """Reserve one piece of a product."""
        note(self.ledger, f"reserve {product}")
        times = notes(self.ledger).count(f"reserve {product}")
        if product.startswith("lamp") and times == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if product.startswith("vase") and times <= 2:
            raise RuntimeError("the shop is busy")
        if product.startswith("kettle"):
            await until(Path(self.gate).exists, "the shop is open")
        return "reserved as R-1"


class Later:
    """Stands for what only a worker process can make: unpickling it there makes it."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self.made_by = (make, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.made_by


def plugin_of(url: str) -> Any:
    return agents_plugin(model_client(base_url=url, api_key=model_key()))


class Graph:
    """The same agent as a graph of LangGraph: one node asks the model, the other one calls the tools."""

    def __init__(self, url: str, model: str, store: Store) -> None:
        from langchain_openai import ChatOpenAI
        from langgraph.prebuilt import ToolNode

        async def reserve(product: str) -> str:
            """Reserve one piece of a product."""
            return await store.reserve(product)

        self.tools = ToolNode([store.stock, reserve])
        llm = ChatOpenAI(model=model, base_url=url, api_key=model_key, max_retries=0)
        self.llm = llm.bind_tools([store.stock, reserve])

    async def think(self, state: Any) -> Any:
        return {"messages": [await self.llm.ainvoke(state["messages"])]}

    async def use_tools(self, state: Any) -> Any:
        from langchain_core.messages import convert_to_messages

        # The plugin hands a node what JSON makes of its messages.
        return await self.tools.ainvoke({"messages": convert_to_messages(state["messages"])})

    def graph(self, **metadata: Any) -> Any:
        from langgraph.graph import START, MessagesState, StateGraph
        from langgraph.prebuilt import tools_condition

        async def route(state: Any) -> str:  # a plain function would want a thread, and workflows have none
            return tools_condition(state)

        graph = StateGraph(MessagesState)
        graph.add_node("think", self.think, metadata=metadata or None)
        graph.add_node("tools", self.use_tools, metadata=metadata or None)
        graph.add_edge(START, "think")
        graph.add_conditional_edges("think", route)
        graph.add_edge("tools", "think")
        return graph


class GraphActivity:
    """A LangGraph agent, whole inside one activity, and without a checkpointer."""

    def __init__(self, url: str, model: str, store: Store) -> None:
        self.made_of = (url, model, store)

    @activity.defn
    async def shop_by_graph(self, wish: Wish) -> str:
        async with beating():
            final = await Graph(*self.made_of).graph().compile().ainvoke({"messages": [("user", errand(wish))]})
        return str(final["messages"][-1].content)


@workflow.defn
class GraphInActivity:
    @workflow.run
    async def run(self, wish: Wish) -> str:
        return await workflow.execute_activity_method(GraphActivity.shop_by_graph, wish, **PATIENCE)


@workflow.defn
class GraphByPlugin:
    @workflow.run
    async def run(self, wish: Wish) -> str:
        with workflow.unsafe.imports_passed_through():
            from temporalio.langgraph import graph

        final = await graph("shop").compile().ainvoke({"messages": [("user", errand(wish))]})
        return str(final["messages"][-1].content)


def graph_plugin(url: str, model: str, store: Store) -> Any:
    from temporalio.langgraph import LangGraphPlugin

    # The plugin wants nodes of a module that can be imported, and does not take a script for one.
    Graph.think.__module__ = Graph.use_tools.__module__ = "shop"
    options = {"start_to_close_timeout": timedelta(seconds=30), "retry_policy": PATIENCE["retry_policy"]}
    return LangGraphPlugin(graphs={"shop": Graph(url, model, store).graph(execute_in="activity", **options)})


PYDANTIC: dict[str, Any] = {}  # the agent of this process


def pydantic_agent(url: str, model: str, store: Store) -> Any:
    """The same agent of Pydantic AI: it has to be made before the workflows that use it."""
    from pydantic_ai import Agent
    from pydantic_ai.durable_exec.temporal import TemporalDurability
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def reserve(product: str) -> str:
        """Reserve one piece of a product."""
        return await store.reserve(product)

    client = model_client(base_url=url, api_key=model_key())
    llm = OpenAIChatModel(model, provider=OpenAIProvider(openai_client=client))
    options = workflow.ActivityConfig(
        start_to_close_timeout=timedelta(seconds=30), retry_policy=PATIENCE["retry_policy"]
    )
    return Agent(
        llm, name="shopper", tools=[store.stock, reserve], capabilities=[TemporalDurability(activity_config=options)]
    )


@workflow.defn(sandboxed=False)  # which would make the agent anew for each run, of a module that has it at its top
class PydanticShopper:
    @workflow.run
    async def run(self, wish: Wish) -> str:
        return str((await PYDANTIC["agent"].run(errand(wish))).output)


def pydantic_plugin() -> Any:
    from pydantic_ai.durable_exec.temporal import PydanticAIPlugin

    return PydanticAIPlugin()


def pydantic_agent_plugin(url: str, model: str, store: Store) -> Any:
    from pydantic_ai.durable_exec.temporal import AgentPlugin

    PYDANTIC["agent"] = pydantic_agent(url, model, store)
    return AgentPlugin(PYDANTIC["agent"])


@dataclass(frozen=True)
class Starts(Interceptor):
    """Notes each time that the code of a run is begun, anew after an eviction as well."""

    ledger: str

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> type[WorkflowInboundInterceptor]:
        ledger = self.ledger

        class Begins(WorkflowInboundInterceptor):
            async def execute_workflow(self, input: ExecuteWorkflowInput) -> Any:
                with workflow.unsafe.sandbox_unrestricted():
                    note(ledger, workflow.info().workflow_id)
                return await super().execute_workflow(input)

        return Begins


@dataclass(frozen=True)
class Way:
    """How an agent of a framework is made durable."""

    name: str
    kind: type
    needs: str  # the module that brings it
    connect: Callable[["Endpoint"], Sequence[Any]] = lambda model: []  # the plugins of a worker's client
    plugins: Callable[["Endpoint", Store], Sequence[Any]] = lambda model, store: []  # those of the worker
    activities: Callable[["Endpoint", Store], Sequence[Any]] = lambda model, store: []
    asks: str = ""  # the activity that asks the model
    tools: Sequence[str] = ()  # the activities that call a tool


WAYS = {
    "agents": Way(
        "OpenAI Agents SDK by Temporal's plugin", Shopper, "temporalio.openai_agents",
        connect=lambda model: [Later(plugin_of, model.url)],
        activities=lambda model, store: [Shopkeeper(store).stock, Shopkeeper(store).reserve],
        asks="invoke_model_activity", tools=["stock", "reserve"],
    ),
    "pydantic": Way(
        "Pydantic AI by its own integration", PydanticShopper, "pydantic_ai.durable_exec.temporal",
        connect=lambda model: [Later(pydantic_plugin)],
        plugins=lambda model, store: [Later(pydantic_agent_plugin, model.url, model.name, store)],
        asks="agent__shopper__model_request", tools=["agent__shopper__toolset__<agent>__call_tool"],
    ),
    "graph": Way(
        "LangGraph by Temporal's plugin", GraphByPlugin, "temporalio.langgraph",
        plugins=lambda model, store: [Later(graph_plugin, model.url, model.name, store)],
        asks="shop.think", tools=["shop.tools"],
    ),
    "activity": Way(
        "LangGraph inside an activity", GraphInActivity, "langgraph.prebuilt",
        activities=lambda model, store: [GraphActivity(model.url, model.name, store).shop_by_graph],
        tools=["shop_by_graph"],
    ),
}  # fmt: skip
KETTLES = 3


class Market:
    """Where the agents of one way shop: their queue, their workers, and what the shop and the model saw of them."""

    def __init__(self, lab: Lab, model: "Endpoint", nursery: Nursery, way: str, name: str = "") -> None:
        self.lab, self.model, self.nursery, self.way, self.name = lab, model, nursery, WAYS[way], name or way
        self.ledger, self.gate = lab.file(f"{self.name}-shop"), lab.gate(self.name)
        self.store, self.begun = Store(self.ledger, self.gate), lab.file(f"{self.name}-begun")

    def worker(self, **options: Any) -> contextlib.AbstractAsyncContextManager[Child]:
        way = self.way
        return self.lab.worker_process(
            [way.kind],
            way.activities(self.model, self.store),
            task_queue=f"{self.lab.id}-{self.name}",
            connect_options={"plugins": way.connect(self.model)},
            plugins=way.plugins(self.model, self.store),
            nursery=self.nursery,
            interceptors=[Starts(self.begun)],
            **options,
        )

    async def shop(self, product: str) -> str:
        """Let an agent shop, and return its report, or why there is none."""
        handle = await self.lab.start(
            self.way.kind.__name__, Wish(self.product(product), self.model.name), name=f"{self.name}-{product}",
            task_queue=f"{self.lab.id}-{self.name}", task_timeout=soon(), result_type=str,
        )  # fmt: skip
        how = await ended(handle)
        return str(how.result if how.status == "COMPLETED" else how)

    def product(self, product: str) -> str:
        """The product as the model hears of it; what stands behind @ asks it for a fault."""
        name, at, fault = product.partition("@")
        return f"{name}-{self.name}{at}{fault}"

    def tools(self, product: str) -> list[str]:
        """The tools that ran for a product."""
        return [line.split()[0] for line in notes(self.ledger) if line.split()[1] == self.product(product)]

    def turns(self, product: str) -> list[int]:
        """At which turn of the conversation the model was called, in the order of the calls; 1 is the first one."""
        return turns_of(self.model, self.product(product))

    def facts(self, product: str, report: str, tools: Sequence[str], turns: Sequence[int]) -> dict[str, Any]:
        """What is to be seen of an agent that has reported."""
        seen: dict[str, Any] = {"tools_that_ran": equal(self.tools(product), list(tools))}
        if self.model.local:
            seen["turns_the_model_saw"] = equal(self.turns(product), list(turns))
        return seen | {"report": contains(report, "7", "R-1")}


def turns_of(model: "Endpoint", product: str) -> list[int]:
    lengths = [call.turn for call in model.calls(product)]
    return [1 + (length - min(lengths)) // 2 for length in lengths]


TOOLS_ONCE, TURNS = ["stock", "reserve"], [1, 2, 3]


def claims_of(way: str) -> dict[str, str]:
    return {
        what: f"{WAYS[way].name}: {claim}"
        for what, claim in {
            "mug": "the agent uses its tools and reports",
            "vase": "a tool that fails twice is retried without the model being asked again",
            "lamp": "worker killed inside the second tool: no model call and no finished tool is repeated",
            "kettle": "three agents evicted in mid-tool: the worker still answers, and each goes on where it was",
        }.items()
    }


async def agents_at_work(market: Market) -> list[Evidence]:
    """One agent's shopping kills the worker. The next one has no room for more than one run at a time."""
    claims = claims_of(market.name)
    if not installed(market.way.needs):
        why = f"{FRAMEWORKS[market.way.needs]}, and is not installed"
        return [not_run("works" if what == "mug" else "holds", claim, why) for what, claim in claims.items()]
    lamp = asyncio.create_task(market.shop("lamp"))
    quick = {"retry_policy": quick_retries(PATIENCE["retry_policy"])}
    hurried = {name: quick | {"start_to_close_timeout": soon()} for name in market.way.tools}
    async with market.worker(shortened=hurried) as worker:
        await worker.wait()
    patient = dict.fromkeys(market.way.tools, quick)
    async with market.worker(shortened=patient, max_cached_workflows=1):
        lamp_report, vase_report = await lamp, await market.shop("vase")
        kettles = [f"kettle{n}" for n in range(KETTLES)]
        boiling = [asyncio.create_task(market.shop(kettle)) for kettle in kettles]
        await until(lambda: all(len(market.tools(kettle)) == 2 for kettle in kettles), "each is in its second tool")
        mug_report = await market.shop("mug")
        open_gate(market.gate)
        kettle_reports = await asyncio.gather(*boiling)
        failing = [await model_errors(market)] if market.name == "agents" else []
    begun = Counter(notes(market.begun))
    each = [
        market.facts(kettle, report, TOOLS_ONCE, TURNS) for kettle, report in zip(kettles, kettle_reports, strict=True)
    ]
    return [
        works(claims["mug"], **market.facts("mug", mug_report, TOOLS_ONCE, TURNS)),
        holds(claims["vase"], **market.facts("vase", vase_report, [*TOOLS_ONCE, "reserve", "reserve"], TURNS)),
        holds(claims["lamp"], **market.facts("lamp", lamp_report, [*TOOLS_ONCE, "reserve"], TURNS)),
        holds(
            claims["kettle"],
            agents=KETTLES,
            max_cached_workflows=1,
            their_code_was_begun_each=at_least(
                min(begun[f"{market.lab.id}-{market.name}-{kettle}"] for kettle in kettles), 2
            ),
            another_one_meanwhile=contains(mug_report, "7", "R-1"),
            **{f"{name}_{n}": fact for n, facts in enumerate(each, 1) for name, fact in facts.items()},
        ),
        *failing,
    ]


MODEL_ERRORS = "OpenAI Agents SDK by Temporal's plugin: a 500 of the model is retried, a 400 fails the workflow at once"


async def model_errors(market: Market) -> Evidence:
    if not market.model.local:
        return not_run("holds", MODEL_ERRORS, UNSEEN)
    report, why = await asyncio.gather(market.shop("cup@500:1"), market.shop("jug@400:9"))
    return holds(
        MODEL_ERRORS,
        **market.facts("cup@500:1", report, TOOLS_ONCE, [1, *TURNS]),
        turns_with_a_400=equal(market.turns("jug@400:9"), [1]),
        then=contains(why, "FAILED", "400"),
    )


OVER_AGAIN = ["stock", "reserve", "stock", "reserve"]
STARTS_OVER = (
    "a framework run whole inside an activity, without a checkpointer, starts over: model calls and tools repeat"
)


IN_ACTIVITY = (
    "a framework inside an activity, each that is prepared here: worker killed inside the second tool: it finishes, on "
    "a second attempt"
)


async def in_activity(market: Market) -> list[Evidence]:
    """LangGraph, and CrewAI where it is prepared: it takes an environment of its own."""
    parts: list[Any] = [graph_in_activity(market), crew_in_activity(market.lab, market.model)]
    (mug, graph), (crew, missing) = await together(*parts)
    finishes, over = ({**ours, **theirs} for ours, theirs in zip(graph, crew, strict=True))
    return [
        works(claims_of("activity")["mug"], **mug),
        holds(IN_ACTIVITY, **finishes, not_looked_at=missing),
        limit(STARTS_OVER, **over, not_looked_at=missing),
    ]


@workflow.defn
class CrewInActivity:
    """The crew is in the worker of another environment, which knows its activity by the name alone."""

    @workflow.run
    async def run(self, given: dict[str, str], abroad: str) -> str:
        report: str = await workflow.execute_activity(
            "shop_by_crew",
            given,
            result_type=str,
            task_queue=abroad,
            start_to_close_timeout=PATIENCE["start_to_close_timeout"],
            heartbeat_timeout=PATIENCE["heartbeat_timeout"],
            retry_policy=PATIENCE["retry_policy"],
        )
        return report


Facts = dict[str, Any]


async def crew_in_activity(lab: Lab, model: "Endpoint") -> tuple[tuple[Facts, Facts], list[str]]:
    """A crew whose worker is killed while its second tool runs. Its worker knows of no server but one on this machine.

    Returns (what must hold, what shows that it starts over), and why it is not looked at where it is not prepared.
    """
    there, missing = prepared("crewai")
    if not there:
        return (Facts(), Facts()), missing
    ledger, gate, wish = lab.file("crew"), lab.gate("crew"), Wish("lamp-crew", model.name)
    errand_of = {"text": errand(wish), "model": model.name, "url": model.url}
    async with (
        lab.private_server() as server,
        lab.worker([CrewInActivity], server=server, shortened=shortened("shop_by_crew", missed=soon())),
        running("crewai", server.client, f"{lab.id}-crew", ledger, gate) as worker,
    ):
        handle = await lab.start(CrewInActivity.run, errand_of, f"{lab.id}-crew", name="crew", server=server)
        await until(lambda: len(notes(ledger)) == 2, "the crew is in its second tool", 120)
        worker.kill()
        open_gate(gate)
        await worker.start(120 * slowness())
        report, title = await ended(handle, 120), await worker.version()
    over = {f"{title}: tools that ran": equal([line.split()[0] for line in notes(ledger)], OVER_AGAIN)}
    if model.local:
        over[f"{title}: turns the model saw"] = equal(turns_of(model, wish.product), [1, 2, *TURNS])
    return (over | {f"{title}: report": contains(str(report.result), "7", "R-1")}, over), missing


async def graph_in_activity(market: Market) -> tuple[Facts, tuple[Facts, Facts]]:
    """What is to be seen where nothing happens; what must hold where the worker is killed, and what shows that it
    starts over."""
    lamp = asyncio.create_task(market.shop("lamp"))
    shorter = shortened("shop_by_graph", missed=soon())
    async with market.worker(shortened=shorter, **PROMPT) as worker:
        await worker.wait()
    async with market.worker(shortened=shorter, **PROMPT):
        report, mug_report = await lamp, await market.shop("mug")
    finishes = market.facts("lamp", report, OVER_AGAIN, [1, 2, *TURNS])
    finishes = {f"LangGraph: {name.replace('_', ' ')}": fact for name, fact in finishes.items()}
    over = {name: fact for name, fact in finishes.items() if not name.endswith("report")}
    return market.facts("mug", mug_report, TOOLS_ONCE, TURNS), (finishes, over)


async def shop_plainly(url: str, wish: Wish, store: Store, done: str) -> None:
    """The control: the agent of the lesson as an ordinary program."""
    from agents import Agent, OpenAIProvider, RunConfig, Runner, function_tool

    async def reserve(product: str) -> str:
        """Reserve one piece of a product."""
        return await store.reserve(product)

    agent = Agent(
        name="Shopper", instructions="You buy things.", model=wish.model,
        tools=[function_tool(store.stock), function_tool(reserve)],
    )  # fmt: skip
    client = model_client(base_url=url, api_key=model_key())
    provider = OpenAIProvider(openai_client=client, use_responses=False)
    result = await Runner.run(agent, errand(wish), run_config=RunConfig(model_provider=provider))
    note(done, str(result.final_output))


async def agent_without_temporal(market: Market) -> Evidence:
    wish, done = Wish(market.product("lamp"), market.model.name), market.lab.file("plain-done")
    for _ in range(2):
        async with market.lab.process(
            shop_plainly, market.model.url, wish, market.store, done, nursery=market.nursery
        ) as program:
            ended_by = await program.wait()
            if ended_by == 0:
                break
    return control(
        "the same agent without Temporal starts over after the kill",
        **market.facts("lamp", (notes(done) or [""])[0], OVER_AGAIN, [1, 2, *TURNS]),
    )


def look_up(file: str) -> None:
    """Look the plugins up where they are imported: this takes seconds, which the main process need not spend."""
    from temporalio.openai_agents import ModelActivityParameters, OpenAIAgentsPlugin
    from temporalio.openai_agents.workflow import activity_as_tool

    evidence = native(
        "the OpenAI Agents SDK's plugin is generally available, and the agent needs no line for its recovery",
        (Client.connect, "plugins"),
        (OpenAIAgentsPlugin, "model_params"),
        (OpenAIAgentsPlugin, "model_provider"),
        (ModelActivityParameters, "start_to_close_timeout"),
        (ModelActivityParameters, "retry_policy"),
        activity_as_tool,
        workflow.unsafe.imports_passed_through,
        adds=keywords_in([Shopper, agents_plugin], "try", "except"),
    )
    note(file, json.dumps(asdict(evidence)))
    if installed("temporalio.langgraph"):
        note(file, str(native("its stage", importlib.import_module("temporalio.langgraph").LangGraphPlugin).stage))


async def plugins_are_native(market: Market) -> list[Evidence]:
    file = market.lab.file("native")
    async with market.lab.process(look_up, file, nursery=market.nursery) as child:
        await child.wait()
    evidence, *stage = notes(file)
    claim = "LangGraph by Temporal's plugin is experimental"
    late = (
        limit(claim, stage=equal(stage[0], "experimental")) if stage else not_run("limit", claim, "it is not installed")
    )
    return [Evidence(**json.loads(evidence)), late]


@AI.item("AI-05", "Agent frameworks", seconds=300)
async def agent_frameworks(lab: Lab) -> AsyncIterator[Evidence]:
    """One agent in three frameworks; its worker dies in mid-agent, forgets it, its tool and its model fail."""
    there = [module for module in (*FRAMEWORKS, *OTHERS) if installed(module)]
    if not installed("temporalio.openai_agents"):
        raise NotRun(f"{FRAMEWORKS['temporalio.openai_agents']} and is not installed")
    with lab.nursery(*there) as nursery:
        async with an_endpoint(lab) as model:
            market = functools.partial(Market, lab, model, nursery)
            parts: list[Any] = [agents_at_work(market(way)) for way in ("agents", "pydantic", "graph")]
            parts += [agent_without_temporal(market("agents", "plain")), plugins_are_native(market("agents", "native"))]
            async for evidence in side_by_side(*parts):
                yield evidence
            for evidence in await in_activity(
                market("activity")
            ):  # alone: CrewAI's imports take a processor for seconds
                yield evidence
    yield cited(
        "CrewAI has no integration; inside an activity, LangGraph and CrewAI go on with checkpoints of their own",
        "scripts in comparison/, with dependencies of their own: crewai and openai-agents do not resolve together",
    )


# AI-06 Tool execution --------------------------------------------------------------------------------
# Each tool is an activity with a patience of its own. What a tool cannot do, the model is told, and goes on; so it is
# told of a tool that it made up. How many tools it may use is the workflow's to say.


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
    messages: list[dict[str, Any]]
    tools: list[str]


@dataclass(frozen=True)
class Tool:
    """A tool as the model is told of it, and how patient to be with it."""

    description: str
    patience: workflow.ActivityConfig

    def told(self, name: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {"topic": {"type": "string"}}, "required": ["topic"]}
        function = {"name": name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


QUICK: workflow.ActivityConfig = {"start_to_close_timeout": timedelta(seconds=30)}
ONCE: workflow.ActivityConfig = {**QUICK, "retry_policy": RetryPolicy(maximum_attempts=1)}
LONG: workflow.ActivityConfig = {
    "start_to_close_timeout": timedelta(hours=1),
    "heartbeat_timeout": timedelta(seconds=30),
    # Who stops the agent waits until the tool has ended: what it was about to do is done or not, and known.
    "cancellation_type": ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
}
TOOLS = {
    "catalogue": Tool("Look a topic up in the catalogue.", {**QUICK, "retry_policy": RetryPolicy(maximum_attempts=5)}),
    "expert": Tool("Ask an expert about a topic, which costs money.", ONCE),
    "archive": Tool("Read what the archive has on a topic.", LONG),
}


class Library(Protocol):
    """The world outside."""

    async def ask(self, source: str, topic: str) -> str: ...

    async def read_page(self, topic: str, page: int) -> None: ...


class Research:
    """The activities of the agent: the model's turns, and its tools with what they need and a model must not see."""

    def __init__(self, llm: Llm, library: Library) -> None:
        self.llm, self.library = llm, library

    @activity.defn
    async def chat(self, chat: Chat) -> Turn:
        """One turn of the model, which answers or asks for tools."""
        tools: Any = [TOOLS[name].told(name) for name in chat.tools]
        try:
            async with beating():
                completion = await self.llm.client.chat.completions.create(
                    model=self.llm.model, messages=list[Any](chat.messages), tools=tools
                )
        except openai.APIError as error:
            raise for_temporal(error) from None
        message = completion.choices[0].message
        calls = [
            ToolCall(one.id, one.function.name, one.function.arguments)
            for one in message.tool_calls or []
            if one.type == "function"
        ]
        return Turn(message.model_dump(exclude_none=True), calls)

    @activity.defn
    async def catalogue(self, topic: str) -> str:
        return await self.library.ask("catalogue", topic)

    @activity.defn
    async def expert(self, topic: str) -> str:
        return await self.library.ask("expert", topic)

    @activity.defn
    async def archive(self, topic: str) -> str:
        """Twenty pages. The last one finished goes with the heartbeat, and comes back to the next attempt."""
        done = activity.info().heartbeat_details
        for page in range(done[0] + 1 if done else 1, 21):
            await self.library.read_page(topic, page)
            activity.heartbeat(page)
        return "20 pages read"


@dataclass
class Task:
    prompt: str
    tools: list[str]
    budget: int = 10  # so many tool calls at most


@workflow.defn
class Researcher:
    """The loop of an agent: the model asks for tools until it has an answer. A person stops it by cancelling it."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    @workflow.run
    async def run(self, task: Task) -> str:
        self.messages.append({"role": "user", "content": task.prompt})
        used = 0
        while True:
            turn = await workflow.execute_activity_method(
                Research.chat, Chat(self.messages, task.tools), **PATIENCE
            )  # fmt: skip
            self.messages.append(turn.message)
            if not turn.calls:
                return str(turn.message.get("content"))
            used += len(turn.calls)
            if used > task.budget:
                return f"stopped by the budget of {task.budget} tool calls"
            # Side by side, and in the order in which the model asked.
            results = await asyncio.gather(*(self.use(call, task.tools) for call in turn.calls))
            for call, result in zip(turn.calls, results, strict=True):
                self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    async def use(self, call: ToolCall, tools: list[str]) -> str:
        """The result of a tool for the model. An exception that is not caught here would keep the workflow for ever."""
        if call.name not in tools:
            return f"There is no tool {call.name}: use one of {', '.join(tools)}."
        try:
            topic = str(json.loads(call.arguments)["topic"])
        except (ValueError, TypeError, KeyError) as error:
            return f"The arguments cannot be read ({error!r}): send JSON with a topic."
        try:
            patience = TOOLS[call.name].patience
            return str(await workflow.execute_activity(call.name, topic, result_type=str, **patience))
        except ActivityError as error:
            if is_cancelled_exception(error):  # by a person, which is no failure of the tool
                raise
            return f"The tool failed: {error.cause}"

    @workflow.query
    def said(self) -> list[dict[str, Any]]:
        return self.messages


class Shelves:
    """A library for the example."""

    async def ask(self, source: str, topic: str) -> str:
        return f"The {source} knows of {topic}."

    async def read_page(self, topic: str, page: int) -> None:
        print(f"Page {page} on {topic}")


async def example_ai_06(client: Client) -> None:
    model = rehearsed(
        calls_tool("oracle", "{}"), calls_tool("catalogue", '{"topic": "tides"}'), {"content": "The moon does it."}
    )
    research = Research(Llm(model, "gpt-5-mini"), Shelves())
    tools = [research.catalogue, research.expert, research.archive]
    async with Worker(client, task_queue="research", workflows=[Researcher], activities=[research.chat, *tools]):
        task = Task("What makes the tides? Use the tools.", list(TOOLS))
        handle = await client.start_workflow(Researcher.run, task, id=f"research-{uuid.uuid4()}", task_queue="research")
        print(await handle.result(), await handle.query(Researcher.said))


# AI-06 put to the test -------------------------------------------------------------------------------

PAGES = 20
HELD = 12  # the page in which the archive's worker is killed
TOOLS["letters"] = Tool("Count the letters of a topic.", {**QUICK, "heartbeat_timeout": timedelta(seconds=10)})
TROUBLE = ["archive", "letters", "catalogue", "expert"]


class Reading:
    """A library whose pages are noted. Each takes a while, and one never ends the first time."""

    def __init__(self, ledger: str, seconds: float = 0, held: int = 0) -> None:
        self.ledger, self.seconds, self.held = ledger, seconds, held

    async def ask(self, source: str, topic: str) -> str:
        return f"{source} says {len(source)}"

    async def read_page(self, topic: str, page: int) -> None:
        note(self.ledger, str(page))
        await asyncio.sleep(self.seconds)
        if page == self.held and notes(self.ledger).count(str(page)) == 1:
            await asyncio.sleep(3600)


class Letters:
    """A tool of an MCP server, which is started for the call and speaks over stdin and stdout; or without one."""

    def __init__(self, server: str = "") -> None:
        self.server = server

    @activity.defn
    async def letters(self, topic: str) -> str:
        if not self.server:
            return f"letters says {len(topic)}"
        async with beating():
            return await self.by_mcp(topic)

    async def by_mcp(self, topic: str) -> str:
        await asyncio.to_thread(importlib.import_module, "mcp")  # takes a second, in which nothing could heartbeat
        from mcp import Client, StdioServerParameters

        server = StdioServerParameters(command=sys.executable, args=[self.server, f"{self.server}.ledger"])
        async with Client(server) as client:
            result = await client.call_tool("count_letters", {"topic": topic})
        return " ".join(one.text for one in result.content if one.type == "text")


@workflow.defn
class Unforgiving(Researcher):
    """The control: a tool that fails is an error like any other."""

    @workflow.run
    async def run(self, task: Task) -> str:
        return await super().run(task)

    async def use(self, call: ToolCall, tools: list[str]) -> str:
        topic, patience = json.loads(call.arguments)["topic"], TOOLS[call.name].patience
        return str(await workflow.execute_activity(call.name, topic, result_type=str, **patience))


class Study:
    """Where research is tried: tasks, the library, and the workers."""

    def __init__(self, lab: Lab, model: "Endpoint") -> None:
        self.lab, self.model = lab, model

    def pages(self, name: str) -> str:
        return self.lab.file(f"{name}-pages")

    def parts(
        self, name: str = "", seconds: float = 0, held: int = 0, letters: Letters | None = None, **options: Any
    ) -> dict[str, Any]:
        """The arguments of a worker for research."""
        research = Research(self.model.llm(), Reading(self.pages(name), seconds, held))
        tools = [research.chat, research.catalogue, research.expert, research.archive, (letters or Letters()).letters]
        return {
            "workflows": [Researcher, Unforgiving],
            "activities": tools,
            "task_queue": f"{self.lab.id}{name and '-'}{name}",
            "shortened": shortened("chat", "catalogue") | shortened("archive", "letters", missed=3 * soon()),
            **PROMPT,
        } | options

    def task(self, name: str, tools: Sequence[str], how: str = "one after the other", **options: Any) -> Task:
        """A task. Its name, behind @, asks the model for a fault."""
        prompt = f"Look up the topic 'tides of {name}' with each of the tools {', '.join(tools)}, once each, {how}."
        return Task(f"{prompt} Then report what they said.", list(tools), **options)

    def turns(self, name: str) -> list["Heard"]:
        return self.model.calls(f"tides of {name}")

    def begun(self, handle: Handle) -> dict[str, int]:
        """How often each tool was begun."""
        return dict(Counter(call.activity for call in self.lab.calls(handle.id) if call.activity != "chat"))


async def results_of(handle: Handle) -> list[str]:
    """What the model was told of its tools."""
    return [one["content"] for one in await handle.query(Researcher.said) if one["role"] == "tool"]


async def four_bad_tools(study: Study) -> list[Evidence]:
    """The model asks for four tools at once; each is bad in its own way. None ends before all have begun."""
    gate = study.lab.gate("four")
    faults = [
        replace(hold("archive", "", silent=True), attempts=1),
        fail("catalogue", 2),
        hold("catalogue", gate),
        hold("letters", gate),
        refuse("expert", why="the expert does not exist"),
    ]
    async with study.lab.worker(**study.parts("four", faults=faults)):
        handle = await study.lab.start(
            Researcher.run, study.task("four", TROUBLE, "all at once"), name="four", task_queue=f"{study.lab.id}-four"
        )
        with contextlib.suppress(TimeoutError):  # or some begin only when others have ended
            await until(lambda: set(study.begun(handle)) == set(TROUBLE), "all four have begun", seconds=10)
        at_once = sorted(study.begun(handle))
        open_gate(gate)
        how = await ended(handle)
        results = await results_of(handle)
    over = [call.activity for call in study.lab.calls(handle.id, "ended") if call.activity != "chat"]
    expected = ["20 pages read", "letters says 13", "catalogue says 9", "The tool failed: the expert does not exist"]
    return [
        works(
            "a flaky, a slow, a hanging and a poison tool: the loop ends with what three said and why one failed",
            attempts=equal(study.begun(handle), {"archive": 2, "letters": 1, "catalogue": 3, "expert": 1}),
            told_to_the_model=equal(sorted(results), sorted(expected)),
            answer=contains(str(how.result), "20", "13", "9"),
        ),
        holds(
            "tools that the model asks for at once run at once, and their results keep the order of the calls",
            begun_before_the_first_of_them_ended=equal(at_once, sorted(TROUBLE)),
            ended_in_another_order=differs(over, [one for one in TROUBLE if one in over]),
            results=equal(results, expected),
        ),
    ]


async def status_in_the_end(handle: Handle) -> str:
    """How a run ended, or that it runs still."""
    with contextlib.suppress(TimeoutError):
        await ended(handle, 20)
    return await status_of(handle)


async def bad_calls(study: Study) -> list[Evidence]:
    """The model calls what there is not, and in ways that nobody understands."""
    told = "a tool that the model made up, broken JSON and unfit arguments are told to the model, which mends its call"
    kept = "without handling, a tool that the model made up keeps the agent for ever: its workflow task fails"
    if not study.model.local:
        return [not_run("holds", told, UNSEEN), not_run("control", kept, UNSEEN)]
    names = [f"{fault}@{fault}:1" for fault in ("invented", "garbled", "unfit")]
    handles = [await study.lab.start(Researcher.run, study.task(name, ["catalogue"]), name=name) for name in names]
    control_name = "control@invented:1"
    stuck = await study.lab.start(Unforgiving.run, study.task(control_name, ["catalogue"]), name=control_name)
    statuses = await asyncio.gather(*map(status_in_the_end, handles))
    both = zip(handles, statuses, strict=True)
    results = [await results_of(handle) if status == "COMPLETED" else [""] for handle, status in both]
    await until(lambda: failed_tasks(stuck), "the workflow task failed")
    status, why = await status_of(stuck), (await failed_tasks(stuck))[0]
    await stuck.terminate()
    first = [one[0] for one in results]
    return [
        holds(
            told,
            told_of_the_made_up_one=contains(first[0], "There is no tool oracle"),
            of_broken_json=contains(first[1], "JSONDecodeError"),
            of_unfit_arguments=contains(first[2], "KeyError"),
            then=equal([one[1:] for one in results], [["catalogue says 9"]] * 3),
            ended=equal(statuses, ["COMPLETED"] * 3),
            tools_that_ran=equal([study.begun(handle) for handle in handles], [{"catalogue": 1}] * 3),
        ),
        control(kept, status=equal(status, "RUNNING"), workflow_task=contains(why, "oracle")),
    ]


async def long_tool_killed(study: Study) -> Evidence:
    """The worker is killed in a page, when the server has heard of the one before."""

    async def heard_of_it() -> bool:
        open_ones = await pending(study.lab.client.get_workflow_handle(f"{study.lab.id}-long"))
        details = [json.loads(payload.data) for one in open_ones for payload in one.heartbeat_details.payloads]
        return details == [HELD - 1]

    taken = await study.lab.take_over(
        Researcher.run, study.task("long", ["archive"]), name="long", task_timeout=soon(),
        parts=study.parts("long", held=HELD),
        point=heard_of_it,
    )  # fmt: skip
    pages = [int(line) for line in notes(study.pages("long"))]
    return holds(
        "a long tool goes on where its last heartbeat was when its worker is killed",
        killed_in_page=equal(pages[:HELD], list(range(1, HELD + 1))),
        pages_of_the_second_attempt=equal(pages[HELD:], list(range(HELD, PAGES + 1))),
        attempts=equal(study.begun(taken.handle), {"archive": 2}),
        answer=contains(str(taken.ending.result), "20 pages"),
    )


async def budget(study: Study) -> Evidence:
    claim = "a model that never stops asking for tools is stopped by the budget"
    if not study.model.local:
        return not_run("holds", claim, UNSEEN)
    name = "budget@endless:99"
    handle = await study.lab.start(Researcher.run, study.task(name, ["catalogue"], budget=3), name=name)
    how = await ended(handle)
    return holds(
        claim,
        result=equal(how.result, "stopped by the budget of 3 tool calls"),
        tools_that_ran=equal(study.begun(handle), {"catalogue": 3}),
        turns_of_the_model=equal(len(study.turns(name)), 4),
    )


async def stop(study: Study) -> Evidence:
    async with study.lab.worker(**study.parts("stop", seconds=0.2 * slowness())):
        task = study.task("stop", ["archive", "catalogue"])
        handle = await study.lab.start(Researcher.run, task, name="stop", task_queue=f"{study.lab.id}-stop")
        await until(lambda: "2" in notes(study.pages("stop")), "the tool is under way", every=0.02)
        await handle.cancel()
        how = await ended(handle)
        history = outline(await handle.fetch_history())
    return holds(
        "a person stops the agent: the tool that is running is cancelled, waited for, and nothing more begins",
        status=equal(how.status, "CANCELED"),
        tools_that_ran=equal(study.begun(handle), {"archive": 1}),
        how_it_ended=equal([call.activity for call in study.lab.calls(handle.id, "failed")], ["archive"]),
        pages_of_20=at_most(len(notes(study.pages("stop"))), PAGES - 1),
        end_of_the_history=equal(history.splitlines()[-2:], ["ActivityTaskCanceled", "WorkflowExecutionCanceled"]),
    )


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
        await asyncio.sleep(3600)
    return f"{len(topic)} letters"


server.run("stdio")
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for counts as ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


async def mcp_tool(study: Study) -> Evidence:
    path = Path(study.lab.file("mcp_server.py"))
    path.write_text(MCP_SERVER, encoding="utf-8")  # as if it were installed
    servers = f"{path}.ledger"

    def pids() -> list[int]:
        return [int(line) for line in notes(servers) if line.isdigit()]

    try:
        taken = await study.lab.take_over(
            Researcher.run, study.task("mcp", ["letters"]), name="mcp", task_timeout=soon(),
            parts=study.parts("mcp", letters=Letters(str(path))),
            point=lambda: "asked" in notes(servers),
        )  # fmt: skip
        await until(lambda: all(map(gone, pids())), "the MCP servers have ended", 10)
    finally:
        for pid in pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return holds(
        "a tool of an MCP server over stdio; its worker killed in mid-call: asked again, no server is left behind",
        answer=contains(str(taken.ending.result), "letters"),
        servers_started_and_ended=equal(len(pids()), 2),
        asked=equal(notes(servers).count("asked"), 2),
    )


async def unforgiving(study: Study) -> Evidence:
    async with study.lab.worker(
        **study.parts("unforgiving", faults=[refuse("expert", why="the expert does not exist")])
    ):
        task = study.task("unforgiving", ["expert"])
        handle = await study.lab.start(
            Unforgiving.run, task, name="unforgiving", task_queue=f"{study.lab.id}-unforgiving"
        )
        how = await ended(handle)
    return control(
        "without handling, one tool that fails is the end of the agent",
        status=equal(how.status, "FAILED"),
        why=contains(how.why, "does not exist"),
        tools_that_ran=equal(study.begun(handle), {"expert": 1}),
    )


@AI.item("AI-06", "Tool execution", seconds=150)
async def tool_execution(lab: Lab) -> AsyncIterator[Evidence]:
    """An agent's tools fail, hang, die, are made up and are stopped; a ledger says which of them really ran."""
    async with an_endpoint(lab) as model:
        study = Study(lab, model)
        parts = (mcp_tool, long_tool_killed, four_bad_tools, stop, bad_calls, budget, unforgiving)
        async with lab.worker(**study.parts()):
            async for evidence in side_by_side(*(part(study) for part in parts)):
                yield evidence
    yield native(
        "patience, retries, heartbeats and stopping of tools are the SDK's; the loop, its budget and errors are not",
        workflow.execute_activity,
        (workflow.execute_activity, "start_to_close_timeout"),
        (workflow.execute_activity, "heartbeat_timeout"),
        (workflow.execute_activity, "retry_policy"),
        (workflow.execute_activity, "cancellation_type"),
        (RetryPolicy, "maximum_attempts"),
        ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        workflow.ActivityConfig,
        WorkflowHandle.cancel,
        activity.heartbeat,
        (activity.Info, "heartbeat_details"),
        adds=["the loop", "the budget", *keywords_in([Researcher, Research], "except")],
    )


# The model behind the items ----------------------------------------------------------------------------
# It stands behind them, since nobody needs to know it to read them: the user's, or a stand-in that speaks the API of
# OpenAI (chat completions, plain and streamed, with tools and JSON schemas). It fails when a call's key, what stands in
# quotes in its prompt, or its model asks for it: "gpt@500:2" answers 500 to two calls, and so does the key
# "order 1@500:2/first", which is counted apart. Every call goes into a ledger that no worker and no Temporal server
# writes.


ANSWER = "Here is my answer to: "
UNSEEN = "a real model is configured: this needs the faults and the call counter of the local stand-in"


@dataclass(frozen=True)
class Heard:
    """One call as the stand-in noted it."""

    model: str
    key: str
    prompt: str
    turn: int
    tokens: int
    at: float
    about: str = ""  # what stands 'in quotes' in the user's prompt
    retry_after: str = ""
    again: float = 0  # when to come again, if Retry-After was sent


class PickledLlm(Llm):
    """One that a worker process makes anew from these: a client cannot be sent there."""

    def __init__(self, url: str, model: str, seconds: float) -> None:
        super().__init__(model_client(base_url=url, api_key=model_key(), timeout=seconds), model)
        self.made_of = (url, model, seconds)

    def __reduce__(self) -> tuple[Callable[..., Llm], tuple[str, str, float]]:
        return PickledLlm, self.made_of


def model_key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "the stand-in asks for none"


@dataclass(frozen=True)
class Endpoint:
    """The model that an item talks to. The stand-in also keeps a `ledger` of its calls, and can fail."""

    url: str
    name: str
    ledger: str = ""

    @property
    def local(self) -> bool:
        return self.ledger != ""

    def llm(self, seconds: float = GIVE_UP.total_seconds()) -> Llm:
        return PickledLlm(self.url, self.name, seconds)

    def named(self, label: str) -> str:
        """The name of the stand-in that tells its calls apart or asks for a fault; of a real model just its name."""
        return f"{self.name}@{label}" if self.local else self.name

    def calls(self, who: str) -> list[Heard]:
        """The calls that the stand-in saw: with keys that begin so, about this, or of a model with this name."""
        assert self.local, "a real model does not tell"
        seen = [Heard(**json.loads(line)) for line in notes(self.ledger)]
        return [one for one in seen if one.key.startswith(who) or who in (one.model, one.about)]

    def gate(self, name: str) -> str:
        """The file for which the fault "pause:1/name" waits."""
        return f"{self.ledger or 'model'}-{name}.gate"


@contextlib.asynccontextmanager
async def an_endpoint(lab: Lab) -> AsyncIterator[Endpoint]:
    """The user's model when there is a key for it, else the stand-in in a process of its own."""
    if os.environ.get("OPENAI_API_KEY"):
        url = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        yield Endpoint(url, os.environ.get("OPENAI_MODEL") or "gpt-4o-mini")
        return
    ledger, ready = lab.file("model"), lab.file("model-port")
    async with lab.process(serve_model, ledger, ready):
        await until(lambda: notes(ready), "the stand-in for the model listens")
        yield Endpoint(f"http://127.0.0.1:{notes(ready)[0]}/v1", "gpt-5-mini", ledger)


async def serve_model(ledger: str, ready: str) -> None:
    """The whole life of the stand-in. It notes its port in `ready` as soon as it listens."""
    app = Starlette(routes=[Route("/v1/chat/completions", StandIn(ledger).answer, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", access_log=False))
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        note(ready, str(listening.getsockname()[1]))
        await server.serve([listening])


class StandIn:
    """The stand-in for a paid model."""

    def __init__(self, ledger: str) -> None:
        self.ledger, self.count = ledger, Counter[str]()

    async def answer(self, request: Request) -> Response:
        body, key = await request.json(), request.headers.get("idempotency-key", "")
        about = (re.findall(r"'([^']+)'", prompt_of(body)) or [""])[0]
        who = next((one for one in (key, about) if "@" in one), body["model"])
        self.count[who] += 1
        label, _, name = who.partition("@")[2].partition("/")
        fault, _, times = label.partition(":")
        if not times or self.count[who] > int(times):
            fault = ""
        message = reply_to(body, fault)
        usage = count_tokens(body["messages"], message)
        headers, again = retry_after(fault)
        prompt = str(body["messages"][-1].get("content"))
        call = Heard(body["model"], key, prompt, len(body["messages"]), usage["total_tokens"], time.time(), about,
                     headers.get("retry-after", ""), again)  # fmt: skip
        note(self.ledger, json.dumps(asdict(call)))
        if fault == "slow":
            await asyncio.sleep(20 * slowness())
        if fault[:3].isdigit():
            refused = {"error": {"message": f"told to fail with {fault}"}}
            return JSONResponse(refused, int(fault[:3]), headers)
        if fault == "drop":
            return StreamingResponse(iter(["{"]), headers={"content-length": "100"})
        if fault == "malformed":
            return Response('{"choices": [', media_type="application/json")
        whole = {"id": "1", "object": "chat.completion", "created": int(time.time()), "model": body["model"]}
        if body.get("stream"):
            gate = f"{self.ledger}-{name}.gate" if fault == "pause" else ""
            return StreamingResponse(as_events(whole, message["content"], gate), media_type="text/event-stream")
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return JSONResponse({**whole, "choices": [choice], "usage": usage})


def retry_after(fault: str) -> tuple[dict[str, str], float]:
    """The header of a refusal for a while, and when that is over."""
    if fault == "429":
        seconds = round(3 * slowness())
        return {"retry-after": str(seconds)}, time.time() + seconds
    if fault == "429-date":
        again = (datetime.now(UTC) + timedelta(seconds=4 * slowness())).replace(microsecond=0)
        return {"retry-after": format_datetime(again, usegmt=True)}, again.timestamp()
    return {}, 0


async def as_events(whole: dict[str, Any], text: str, gate: str) -> AsyncIterator[str]:
    """Server-sent events, one token each."""
    for number, token in enumerate([*re.findall(r"\S+\s*", text), ""]):
        if number == PAUSE and gate:
            await until(Path(gate).exists, "it may go on")
        choice = {"index": 0, "delta": {"content": token}, "finish_reason": None if token else "stop"}
        yield f"data: {json.dumps({**whole, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
        await asyncio.sleep(0.01)
    yield "data: [DONE]\n\n"


def reply_to(body: dict[str, Any], fault: str) -> dict[str, Any]:
    """A message that serves the prompt: it calls the tools that are offered, and then reports on them."""
    messages, tools = body["messages"], body.get("tools", [])
    prompt = prompt_of(body)
    results = [text_in(one["content"]) for one in messages if one["role"] == "tool"]
    served = [one for one in results if not one.startswith(("There is no tool", "The arguments"))]
    left = tools[:1] if fault == "endless" else tools[len(served) :]
    if fault in ("invented", "garbled", "unfit"):
        return {"role": "assistant", "content": None, "tool_calls": [bad_call(fault, tools[0], prompt)]}
    if left:
        wanted = left if "at once" in prompt else left[:1]
        return {"role": "assistant", "content": None, "tool_calls": [tool_call(one, prompt) for one in wanted]}
    return {"role": "assistant", "content": text_for(body, prompt, results, fault)}


def prompt_of(body: dict[str, Any]) -> str:
    return next(text_in(one["content"]) for one in reversed(body["messages"]) if one["role"] == "user")


def text_in(content: Any) -> str:
    """What a message says; its content is a text or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


def text_for(body: dict[str, Any], prompt: str, results: list[str], fault: str) -> str:
    span = re.search(r"from (\d+) to (\d+)", prompt)
    if form := body.get("response_format"):
        filled = json.dumps(fill(form["json_schema"]["schema"], prompt))
        if fault == "invalid" or (fault == "mending" and "refused" not in prompt):
            return "I would say two mugs."
        return filled.replace("2", '"a few"') if fault == "mending" and "Invalid JSON" in prompt else filled
    if results:
        return f"Done: {'; '.join(results)}."
    if span:
        return " ".join(f"{number}," for number in range(int(span.group(1)), int(span.group(2)) + 1))
    return f"{ANSWER}{prompt}"


def tool_call(tool: dict[str, Any], prompt: str, **other: str) -> dict[str, Any]:
    function = {"name": tool["function"]["name"], "arguments": json.dumps(fill(tool["function"]["parameters"], prompt))}
    return {"id": f"call_{secrets.token_hex(4)}", "type": "function", "function": function | other}


def bad_call(fault: str, tool: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A call of a tool that there is none of, with arguments that are no JSON, or with others than the tool takes."""
    bad = {
        "invented": {"name": "oracle"},
        "garbled": {"arguments": '{"topic": '},
        "unfit": {"arguments": '{"page": 1}'},
    }
    return tool_call(tool, prompt, **bad[fault])


def fill(schema: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Values for a schema: a choice by chance, a text as it stands 'in quotes' in the prompt, its first number."""
    text, number = re.search(r"'([^']+)'", prompt), re.search(r"\d+", prompt)
    values = {"string": text.group(1) if text else "nothing", "integer": int(number.group()) if number else 0}
    properties = schema.get("properties", {})
    return {
        name: secrets.choice(one["enum"]) if "enum" in one else values[one["type"]] for name, one in properties.items()
    }


def count_tokens(messages: list[dict[str, Any]], message: dict[str, Any]) -> dict[str, int]:
    asked, answered = len(json.dumps(messages).split()), len(json.dumps(message).split())
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


if __name__ == "__main__":
    run(AI)
