// A worker in Java: an activity that Python's workflows call, and a workflow that calls Python's in turn.

import io.temporal.activity.ActivityInterface;
import io.temporal.activity.ActivityMethod;
import io.temporal.activity.ActivityOptions;
import io.temporal.client.WorkflowClient;
import io.temporal.failure.ActivityFailure;
import io.temporal.failure.ApplicationFailure;
import io.temporal.serviceclient.WorkflowServiceStubs;
import io.temporal.serviceclient.WorkflowServiceStubsOptions;
import io.temporal.worker.WorkerFactory;
import io.temporal.workflow.ChildWorkflowOptions;
import io.temporal.workflow.Workflow;
import io.temporal.workflow.WorkflowInterface;
import io.temporal.workflow.WorkflowMethod;
import java.time.Duration;

public class Worker {
  public record Crate(String article, int pieces) {}

  public record Quote(int total, String by) {}

  public record Label(String text, String permit, String by) {}

  @ActivityInterface
  public interface Quoting {
    @ActivityMethod(name = "quote")
    Quote quote(Crate crate);
  }

  public static class Quotes implements Quoting {
    @Override
    public Quote quote(Crate crate) {
      if (crate.pieces() < 1) {
        throw ApplicationFailure.newNonRetryableFailure("there is nothing to send", "Empty", crate);
      }
      return new Quote(crate.pieces() * 3, "java");
    }
  }

  @WorkflowInterface
  public interface Parcel {
    @WorkflowMethod(name = "Parcel")
    Label run(Crate crate, String home);
  }

  public static class Parcels implements Parcel {
    @Override
    public Label run(Crate crate, String home) {
      var label =
          Workflow.newUntypedActivityStub(
              ActivityOptions.newBuilder()
                  .setTaskQueue(home)
                  .setStartToCloseTimeout(Duration.ofSeconds(30))
                  .build());
      var permit =
          Workflow.newUntypedChildWorkflowStub(
              "Permit", ChildWorkflowOptions.newBuilder().setTaskQueue(home).build());
      String text;
      try {
        text = label.execute("label", String.class, crate);
      } catch (ActivityFailure failure) {
        text = "refused as " + ((ApplicationFailure) failure.getCause()).getType();
      }
      return new Label(text, permit.execute(String.class, crate), "java's Parcel");
    }
  }

  public static void main(String[] arguments) {
    var options = WorkflowServiceStubsOptions.newBuilder().setTarget(arguments[0]).build();
    var client = WorkflowClient.newInstance(WorkflowServiceStubs.newServiceStubs(options));
    var factory = WorkerFactory.newInstance(client);
    var worker = factory.newWorker(arguments[1]);
    worker.registerWorkflowImplementationTypes(Parcels.class);
    worker.registerActivitiesImplementations(new Quotes());
    factory.start();
  }
}
