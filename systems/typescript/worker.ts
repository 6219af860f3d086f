// A worker in TypeScript: an activity that Python's workflows call, and a workflow that calls Python's in turn.

import { ApplicationFailure } from '@temporalio/activity';
import { NativeConnection, Worker } from '@temporalio/worker';

import type { Crate, Quote } from './contract';

async function quote(crate: Crate): Promise<Quote> {
  if (crate.pieces < 1) {
    throw ApplicationFailure.nonRetryable('there is nothing to send', 'Empty', crate);
  }
  return { total: crate.pieces * 3, by: 'typescript' };
}

async function main(address: string, taskQueue: string): Promise<void> {
  const worker = await Worker.create({
    connection: await NativeConnection.connect({ address }),
    taskQueue,
    activities: { quote },
    workflowBundle: { codePath: require.resolve('./workflow-bundle.js') },
  });
  await worker.run();
}

main(process.argv[2], process.argv[3]).catch((error) => {
  console.error(error);
  process.exit(1);
});
