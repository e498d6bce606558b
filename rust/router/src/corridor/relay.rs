//! The way of a request to a foreign engine, and of its answer back: the same stages as the corridor's, for bytes.
//!
//! ```text
//! read → admit → place → exchange → relay
//! RelayRequest  Admitted     Reply
//! ```
//!
//! The engine gets the body that the client wrote, byte for byte, and the client what the engine wrote. Until the first
//! byte has gone to the client, a failure is another engine's turn ([`attempts`]); after it, the stream is continued
//! elsewhere from what was sent ([`resume`]), and where that cannot be done truthfully it ends with an error event. A batch
//! request that is stopped for a more urgent one goes on in the same way, once its turn has come ([`held`]).
//! Everything of one request is polled in one task, the client's connection: when the client leaves, that drops the
//! connection to the engine, which learns of it at once.

mod admit;
mod answer;
mod attempts;
mod check;
mod count;
mod events;
mod held;
mod key;
mod memory;
mod read;
mod resume;
mod run;
mod shape;
mod splice;
mod stream;

use std::{sync::Arc, time::Duration};

use axum::{body::Body, http::Response};

use self::attempts::Attempts;
pub(crate) use self::read::{Outward, RelayRequest, Route, read};
use crate::{error::ApiError, state::RouterState};

/// Runs a request on a foreign engine. An error means that nothing of an answer has gone to the client.
pub(crate) async fn relay(
    state: &Arc<RouterState>,
    request: RelayRequest,
    keep_alive: Duration,
) -> Result<Response<Body>, ApiError> {
    let admitted = request.tokenised(state).await.admit(state).await?;
    let mut attempts = Attempts::new(admitted);
    if attempts.admitted.request.checked.stream {
        return stream::respond(attempts, keep_alive).await;
    }
    match attempts.exchange().await {
        Ok(reply) => attempts.finish(reply),
        Err(reason) => attempts.give_up(reason),
    }
}
