// What both sides know each other by.

export interface Crate {
  article: string;
  pieces: number;
}

export interface Quote {
  total: number;
  by: string;
}

export interface Label {
  text: string;
  permit: string;
  by: string;
}

export interface Python {
  label(crate: Crate): Promise<string>;
}
