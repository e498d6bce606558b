//! Mixtures of experts on the CPU: which of many small MLPs a token goes to, and the weighted sum of what they make of it
//! (Shazeer et al., "Outrageously Large Neural Networks", 2017).
//!
//! [`Router`] chooses. [`Experts`] sorts the pairs of token and pick by expert, so that what an expert computes is a run of
//! rows; computes all runs at once, whatever their lengths; and adds up each token's rows in the order of its picks. No
//! expert has a limit of tokens. A token's result depends on that token alone, to the bit, as everything that it is made
//! of does.

#![expect(unsafe_code, reason = "sees the memory of tensors")]

mod router;
mod runs;

use std::{cell::RefCell, sync::Arc};

pub use self::router::{Choice, Picks, Router};
use self::runs::Runs;
use crate::{
    error::LinearError,
    linear::{Rows, Together},
    pairs::{Line, Lines},
    rows::{self, Activation, Gate, LookUp, Mix},
};

/// Memory for the rows of a call at most, where those of one token take no more: longer calls read the weights several times.
const ROOM_BYTES: usize = 64 << 20;

thread_local! {
    /// Kept between calls, for all layers.
    static ROOM: RefCell<Room> = RefCell::new(Room::default());
}

/// What the thread that calls needs beside the tensors.
#[derive(Default)]
struct Room {
    runs: Runs,
    /// Rows of numbers.
    lines: Lines,
}

/// Tokens to compute: `count` of them.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<E> {
    /// `[count, hidden]`, without gaps.
    pub input: *const E,
    /// `[count, picks]`: the experts of each token, by their numbers in the model. Those that are not here add nothing.
    pub chosen: *const i32,
    /// `[count, picks]`: what multiplies their results.
    pub weights: *const f32,
    /// Experts of a token.
    pub picks: usize,
    /// `[count, hidden]`, without gaps.
    pub output: *mut E,
    /// How many.
    pub count: usize,
}

/// One expert: `down(act(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Expert<L> {
    /// Inputs to gates and values side by side.
    pub gate_up: Arc<L>,
    /// Their products to outputs.
    pub down: Arc<L>,
}

/// Some experts of a model, of consecutive numbers.
pub struct Experts<L> {
    first: i32,
    all: Vec<Expert<L>>,
    activation: Activation,
    hidden: usize,
    /// Numbers between the two layers of an expert.
    width: usize,
}

impl<L: Together> Experts<L> {
    /// Experts that have these numbers in the model, `first` and what follows; all of the same shape.
    pub fn new(
        first: usize,
        activation: Activation,
        experts: Vec<Expert<L>>,
    ) -> Result<Self, LinearError> {
        let wrong = |field, reason| Err(LinearError::InvalidShape { field, reason });
        let Some(Expert { gate_up, down }) = experts.first() else {
            return wrong("experts", "are none");
        };
        let ((hidden, width), (twice, inputs)) = (down.shape(), gate_up.shape());
        if twice != 2 * width || inputs != hidden {
            return wrong("down", "does not fit gates and values");
        }
        let is_equal = |it: &Expert<L>| {
            (it.gate_up.shape(), it.down.shape()) == ((twice, hidden), (hidden, width))
        };
        if !experts.iter().all(is_equal) {
            return wrong("experts", "are not of the same shape");
        }
        let Ok(first) = i32::try_from(first) else {
            return wrong("first", "is not below 2147483648");
        };
        Ok(Self {
            first,
            all: experts,
            activation,
            hidden,
            width,
        })
    }

    /// Computes some tokens, on up to `threads` threads.
    ///
    /// # Safety
    /// The addresses are of tensors of the shapes that [`Tokens`] says, aligned for their numbers. Until the call returns
    /// nobody writes the inputs, and nobody reads or writes the outputs.
    pub unsafe fn forward(&self, tokens: &Tokens<L::Number>, threads: u32) {
        let row_bytes = (self.hidden + 3 * self.width) * size_of::<L::Number>();
        let most = (ROOM_BYTES / (row_bytes * tokens.picks.max(1))).max(1);
        ROOM.with_borrow_mut(|room| {
            for first in (0..tokens.count).step_by(most) {
                // SAFETY: the caller's promise: these are some of its tokens.
                unsafe {
                    let some = Tokens {
                        input: tokens.input.add(first * self.hidden),
                        chosen: tokens.chosen.add(first * tokens.picks),
                        weights: tokens.weights.add(first * tokens.picks),
                        output: tokens.output.add(first * self.hidden),
                        count: most.min(tokens.count - first),
                        ..*tokens
                    };
                    self.forward_with(room, &some, threads);
                }
            }
        });
    }

    /// Computes as many tokens as there is room for.
    ///
    /// # Safety
    /// As `forward`.
    unsafe fn forward_with(&self, room: &mut Room, tokens: &Tokens<L::Number>, threads: u32) {
        let (hidden, width) = (self.hidden, self.width);
        // SAFETY: the caller's promise.
        let chosen =
            unsafe { std::slice::from_raw_parts(tokens.chosen, tokens.count * tokens.picks) };
        let runs = &mut room.runs;
        runs.sort(chosen, tokens.picks, self.first, self.all.len());
        let count = runs.tokens().len();
        let [inputs, gates, gated] =
            split::<L::Number>(&mut room.lines, count, [hidden, 2 * width, width]);
        let gather = LookUp {
            table: tokens.input,
            height: tokens.count,
            places: runs.tokens().as_ptr(),
            first: 0,
            scale: None,
            output: inputs,
            count,
            size: hidden,
        };
        let gate = Gate {
            input: gates,
            output: gated,
            count,
            size: width,
            activation: self.activation,
        };
        let mix = Mix {
            // What went into the experts is needed no more.
            rows: inputs,
            places: runs.places().as_ptr(),
            weights: tokens.weights,
            output: tokens.output,
            count: tokens.count,
            picks: tokens.picks,
            size: hidden,
        };
        // SAFETY: the caller's promise; what lies between is this thread's, and has room for so many rows.
        unsafe {
            rows::look_up(&gather, threads);
            self.layers(runs, |it| &it.gate_up, (inputs, gates), threads);
            rows::gate(&gate, threads);
            self.layers(runs, |it| &it.down, (gated, inputs), threads);
            rows::mix(&mix, threads);
        }
    }

    /// Computes one of the two layers, of each expert for its run of rows.
    ///
    /// # Safety
    /// The rows are there, and as many for the outputs.
    unsafe fn layers(
        &self,
        runs: &Runs,
        layer: impl Fn(&Expert<L>) -> &L,
        (input, output): (*const L::Number, *mut L::Number),
        threads: u32,
    ) {
        let with_rows = self.all.iter().zip(runs.iter());
        let calls: Vec<_> = with_rows
            .filter(|(_, run)| !run.is_empty())
            .map(|(expert, run)| {
                let layer = layer(expert);
                let (outputs, inputs) = layer.shape();
                let rows = Rows {
                    input: input.wrapping_add(run.start * inputs),
                    input_stride: inputs,
                    output: output.wrapping_add(run.start * outputs),
                    count: run.len(),
                };
                (layer, rows)
            })
            .collect();
        // SAFETY: the caller's promise.
        unsafe { L::forward_together(&calls, threads) };
    }
}

/// Room for `rows` rows each of some tensors, each `widths` numbers wide.
fn split<E>(lines: &mut Lines, rows: usize, widths: [usize; 3]) -> [*mut E; 3] {
    let lines_of = |width: usize| (rows * width * size_of::<E>()).div_ceil(size_of::<Line>());
    let mut free = lines.take(widths.into_iter().map(lines_of).sum());
    widths.map(|width| {
        let start = free.cast();
        free = free.wrapping_add(lines_of(width));
        start
    })
}
