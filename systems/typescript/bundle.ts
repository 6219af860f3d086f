// Part of the build, so that no worker has to bundle its workflows at each start.

import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import { bundleWorkflowCode } from '@temporalio/worker';

async function main(): Promise<void> {
  const { code } = await bundleWorkflowCode({ workflowsPath: require.resolve('./workflows') });
  await writeFile(join(__dirname, 'workflow-bundle.js'), code);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
