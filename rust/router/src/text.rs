//! Between text and tokens: tokeniser, chat template, incremental detokeniser, stop strings.

pub mod clock;
pub mod detokenizer;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod json;
pub mod stop;
pub mod template;
pub mod tokenizer;
