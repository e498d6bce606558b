//! Between text and tokens: tokeniser, chat template, incremental detokeniser, stop strings.

mod bpe;
pub mod clock;
pub mod detokenizer;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod json;
mod segments;
pub mod stop;
pub mod template;
pub mod tokenizer;
