//! W3C trace context: `traceparent` and `tracestate`, from the client and on to foreign engines.
//! <https://www.w3.org/TR/trace-context/>

use std::fmt::Write as _;

/// HTTP header and gRPC metadata with the trace that a request belongs to.
pub(crate) const TRACEPARENT_KEY: &str = "traceparent";
/// HTTP header and gRPC metadata that goes on with it as it is.
pub(crate) const TRACESTATE_KEY: &str = "tracestate";
/// The longest `tracestate` that is passed on; a longer one may be dropped by the standard.
const STATE_BYTES_MAX: usize = 512;
/// Of the flags, the one that says that the caller records this trace.
const SAMPLED: u8 = 1;

/// The trace of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TraceContext {
    /// 16 bytes, not all zero.
    pub(super) trace_id: u128,
    /// The caller's span; `None` where the trace begins here.
    pub(super) parent_id: Option<u64>,
    /// This router's span, which is the parent of what it calls.
    pub(super) span_id: u64,
    /// Whether the trace is recorded.
    pub(super) is_sampled: bool,
    /// The caller's `tracestate`.
    pub(super) state: Option<String>,
}

impl TraceContext {
    /// The caller's trace; `None` where there is none that can be read.
    pub(super) fn from_caller(
        traceparent: Option<&[u8]>,
        tracestate: Option<&[u8]>,
    ) -> Option<Self> {
        let text = std::str::from_utf8(traceparent?).ok()?;
        let mut parts = text.trim().split('-');
        let (version, trace_id, parent_id) = (parts.next()?, parts.next()?, parts.next()?);
        let flags = parts.next()?;
        let version = hex(version, 2)?;
        // Version 0 has four parts; a later one may have more behind them.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        let trace_id = hex(trace_id, 32).filter(|&id| id != 0)?;
        let parent_id = hex(parent_id, 16).filter(|&id| id != 0)?;
        let flags = hex(flags, 2)?;
        let state = tracestate.and_then(|state| std::str::from_utf8(state).ok());
        let is_fit = |state: &&str| {
            let is_plain = state.bytes().all(|byte| (0x20..0x7f).contains(&byte));
            !state.is_empty() && state.len() <= STATE_BYTES_MAX && is_plain
        };
        Some(Self {
            trace_id,
            parent_id: Some(parent_id as u64),
            span_id: fresh_id(),
            is_sampled: flags as u8 & SAMPLED != 0,
            state: state.filter(is_fit).map(str::to_owned),
        })
    }

    /// A trace that begins here.
    pub(super) fn new(is_sampled: bool) -> Self {
        Self {
            trace_id: fastrand::u128(1..),
            parent_id: None,
            span_id: fresh_id(),
            is_sampled,
            state: None,
        }
    }

    /// The `traceparent` for what this router calls, with its own span as the parent.
    pub(super) fn traceparent(&self) -> String {
        let Self {
            trace_id, span_id, ..
        } = self;
        let flags = if self.is_sampled { SAMPLED } else { 0 };
        format!("00-{trace_id:032x}-{span_id:016x}-{flags:02x}")
    }

    /// The trace's id as people and logs write it.
    pub(super) fn trace_id_text(&self) -> String {
        let mut text = String::with_capacity(32);
        let _ = write!(text, "{:032x}", self.trace_id);
        text
    }
}

/// A span's id: 8 bytes, not all zero.
pub(super) fn fresh_id() -> u64 {
    fastrand::u64(1..)
}

/// Lower-case hexadecimal of exactly this length.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() != digits || !text.bytes().all(is_hex) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_caller_s_trace_goes_on_under_a_span_of_our_own() {
        let trace = TraceContext::from_caller(Some(PARENT.as_bytes()), Some(b"a=1,b=2")).unwrap();
        assert_eq!(trace.parent_id, Some(0x00f0_67aa_0ba9_02b7));
        assert!(trace.is_sampled);
        assert_eq!(trace.state.as_deref(), Some("a=1,b=2"));
        assert_eq!(trace.trace_id_text(), &PARENT[3..35]);
        let onward = trace.traceparent();
        assert_eq!((&onward[..36], &onward[52..]), (&PARENT[..36], "-01"));
        assert_ne!(onward, PARENT);
        let again = TraceContext::from_caller(Some(onward.as_bytes()), None).unwrap();
        assert_eq!(again.parent_id, Some(trace.span_id));
    }

    #[test]
    fn what_is_no_trace_context_begins_none() {
        let long = format!("{PARENT}-extra");
        for odd in [
            "",
            "00",
            &PARENT[..54],
            &long,
            &PARENT.replace("00-4b", "ff-4b"),
            &PARENT.to_uppercase(),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(
                TraceContext::from_caller(Some(odd.as_bytes()), None),
                None,
                "{odd}"
            );
        }
        assert_eq!(TraceContext::from_caller(None, Some(b"a=1")), None);
        // A later version may say more.
        let later = long.replace("00-4b", "01-4b");
        assert!(TraceContext::from_caller(Some(later.as_bytes()), None).is_some());
        // A state that cannot be passed on is left out, the trace is not.
        let long = "x".repeat(513);
        for state in [&b"\xff"[..], b"", b"a\x07", long.as_bytes()] {
            let trace = TraceContext::from_caller(Some(PARENT.as_bytes()), Some(state));
            assert_eq!(trace.unwrap().state, None);
        }
    }
}
