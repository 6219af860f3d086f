import { ActivityFailure, ApplicationFailure, executeChild, proxyActivities } from '@temporalio/workflow';

import type { Crate, Label, Python } from './contract';

export async function Parcel(crate: Crate, home: string): Promise<Label> {
  const python = proxyActivities<Python>({ taskQueue: home, startToCloseTimeout: '30 seconds' });
  const text = await python.label(crate).catch((failure: unknown) => {
    if (failure instanceof ActivityFailure && failure.cause instanceof ApplicationFailure) {
      return `refused as ${failure.cause.type}`;
    }
    throw failure;
  });
  const permit: string = await executeChild('Permit', { taskQueue: home, args: [crate] });
  return { text, permit, by: "typescript's Parcel" };
}
