//! Whether an engine is there: one task for each looks after it.
//!
//! It keeps one connection open and watches it, so that the end of a process is noticed at once; it asks `GET /health`
//! when nothing else was heard, so that a hung one is found within a second; and while the engine is away it tries four
//! times a second, so that a restarted one gets requests again within half a second.

use std::{sync::Arc, time::Duration};

use tokio::time;

use super::{
    engine::Engine,
    exact,
    probe::{ProbeError, Prober},
};
use crate::state::RouterState;

/// Time between two questions to an engine that is up, at most; spread, so that hundreds are not asked at once.
const PERIOD: Duration = Duration::from_millis(500);
/// And to one that is away.
const PERIOD_AWAY: Duration = Duration::from_millis(250);
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_millis(500);
/// An engine that closes its idle connections right away is not watched closer than this.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// Looks after an engine until it is removed or the router ends.
pub(super) async fn look_after(state: Arc<RouterState>, engine: Arc<Engine>) {
    let shutdown = state.tasks.shutdown_token().clone();
    let attending = async {
        exact::load(&state, &engine).await;
        loop {
            let Err(error) = attend(&state, &engine).await;
            state.engine_down(&engine, &error.to_string());
            time::sleep(spread(PERIOD_AWAY)).await;
        }
    };
    tokio::select! {
        biased;
        () = attending => {}
        () = engine.removed.cancelled() => {}
        () = shutdown.cancelled() => {}
    }
}

/// Attends to an engine from the first sign of life to the first sign of trouble.
async fn attend(
    state: &Arc<RouterState>,
    engine: &Arc<Engine>,
) -> Result<std::convert::Infallible, ProbeError> {
    let mut prober = Prober::connect(engine, TIMEOUT).await?;
    loop {
        prober.health().await?;
        state.engine_up(engine, &prober.identify().await?);
        // Until the connection ends, which may be its process or its patience with idle connections.
        watch(state, engine, &mut prober).await?;
        time::sleep(RECONNECT_PAUSE).await;
        prober = Prober::connect(engine, TIMEOUT).await?;
    }
}

/// Asks now and then, and returns when the connection ends.
async fn watch(
    state: &RouterState,
    engine: &Engine,
    prober: &mut Prober<'_>,
) -> Result<(), ProbeError> {
    loop {
        let asked = state.clock.now();
        tokio::select! {
            biased;
            () = prober.closed() => return Ok(()),
            () = time::sleep(spread(PERIOD)) => {
                state.engine_tick(engine);
                if engine.was_heard_since(asked) {
                    continue;
                }
            }
            // A request could not reach it.
            () = engine.doubted.notified() => {}
        }
        let asked = state.clock.now();
        match prober.health().await {
            Ok(()) => {}
            // It is slow to answer, but it computes.
            Err(ProbeError::Late) if engine.was_heard_since(asked) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Up to a fifth less.
fn spread(period: Duration) -> Duration {
    period.mul_f64(1.0 - 0.2 * fastrand::f64())
}
