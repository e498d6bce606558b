//! The one way from a request to its tokens: every door enters [`generate`].
//!
//! ```text
//! parse → tokenise → admit → place → dispatch → stream
//!         Tokenised  Ticket  Placed  Running    TokenStream
//! ```
//!
//! Each stage consumes the one before; dropping a value gives back what it holds: the place in the queue, the seat,
//! the room on a worker, the sequence on it. To admit is to wait in the core's queue, which ends with a worker that has
//! room; so what is left to place are the further choices of a request that wants several. A worker that is lost is an arm of dispatch and stream ([`replay`]): the
//! request goes on elsewhere, and the client sees a pause.

mod admit;
mod choice;
mod dispatch;
mod held;
mod pause;
mod place;
pub(crate) mod relay;
mod replay;
mod stream;
mod tokenise;

use std::sync::Arc;

pub(crate) use self::admit::Admission;
pub use self::stream::TokenStream;
use crate::{error::ApiError, observe::Stage, request::GenerateInput, state::RouterState};

/// Runs a request. An error means that nothing was started.
pub async fn generate(
    state: &Arc<RouterState>,
    input: GenerateInput,
) -> Result<TokenStream, ApiError> {
    let record = input.record.clone();
    let tokenised = tokenise::tokenise(state, input).await?;
    record.reached(Stage::Tokenised);
    let ticket = tokenised.admit().await?;
    record.reached(Stage::Admitted);
    let placed = ticket.place()?;
    record.reached(Stage::Placed);
    let running = placed.dispatch()?;
    record.reached(Stage::Dispatched);
    Ok(running.stream())
}
