// A worker in Go: an activity that Python's workflows call, and a workflow that calls Python's in turn.
package main

import (
	"context"
	"errors"
	"log"
	"os"
	"time"

	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"
)

type Crate struct {
	Article string `json:"article"`
	Pieces  int    `json:"pieces"`
}

type Quote struct {
	Total int    `json:"total"`
	By    string `json:"by"`
}

type Label struct {
	Text   string `json:"text"`
	Permit string `json:"permit"`
	By     string `json:"by"`
}

func quote(_ context.Context, crate Crate) (Quote, error) {
	if crate.Pieces < 1 {
		return Quote{}, temporal.NewNonRetryableApplicationError("there is nothing to send", "Empty", nil, crate)
	}
	return Quote{Total: crate.Pieces * 3, By: "go"}, nil
}

func parcel(ctx workflow.Context, crate Crate, home string) (Label, error) {
	label := Label{By: "go's Parcel"}
	ctx = workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		TaskQueue: home, StartToCloseTimeout: 30 * time.Second,
	})
	ctx = workflow.WithChildOptions(ctx, workflow.ChildWorkflowOptions{TaskQueue: home})
	if err := workflow.ExecuteActivity(ctx, "label", crate).Get(ctx, &label.Text); err != nil {
		var refusal *temporal.ApplicationError
		if !errors.As(err, &refusal) {
			return label, err
		}
		label.Text = "refused as " + refusal.Type()
	}
	err := workflow.ExecuteChildWorkflow(ctx, "Permit", crate).Get(ctx, &label.Permit)
	return label, err
}

func main() {
	connection, err := client.Dial(client.Options{HostPort: os.Args[1]})
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	abroad := worker.New(connection, os.Args[2], worker.Options{})
	abroad.RegisterActivityWithOptions(quote, activity.RegisterOptions{Name: "quote"})
	abroad.RegisterWorkflowWithOptions(parcel, workflow.RegisterOptions{Name: "Parcel"})
	if err := abroad.Run(worker.InterruptCh()); err != nil {
		log.Fatal(err)
	}
}
