//! What the process writes about requests.

use super::Span;

/// Where requests leave a trace, and how much of one.
#[derive(Clone, Debug, clap::Args)]
pub struct ObserveConfig {
    /// Write a line of JSON per request to this file, or to standard output for `-`. SIGHUP opens the file anew.
    #[arg(long, value_name = "PATH", env = "ORCHESTRA_ACCESS_LOG")]
    pub access_log: Option<String>,
    /// Warn of a request whose first token takes longer.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_SLOW_TTFT")]
    pub slow_ttft: Option<Span>,
    /// Warn of a request that takes longer in all.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_SLOW_TOTAL")]
    pub slow_total: Option<Span>,
    /// Requests whose placement `GET /admin/decisions` remembers.
    #[arg(long, value_name = "COUNT", env = "ORCHESTRA_DECISIONS")]
    #[arg(default_value_t = Self::default().decisions)]
    pub decisions: usize,
    /// Share of requests, 0 to 1, whose placement is explained in full: every worker judged. A request with the header
    /// `x-orchestra-explain: 1` is too. At most ten in a second are, whoever asks.
    #[arg(long, value_name = "SHARE", env = "ORCHESTRA_EXPLAIN_SHARE")]
    #[arg(default_value_t = Self::default().explain_share)]
    pub explain_share: f64,
    /// Send a trace of each request to this OpenTelemetry collector: OTLP over gRPC, such as `http://localhost:4317`.
    #[arg(long, value_name = "URL", env = "ORCHESTRA_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Share of requests, 0 to 1, that are traced; where the caller sends a `traceparent`, it decides.
    #[arg(long, value_name = "SHARE", env = "ORCHESTRA_OTLP_SAMPLE_SHARE")]
    #[arg(default_value_t = Self::default().otlp_sample_share)]
    pub otlp_sample_share: f64,
}

impl Default for ObserveConfig {
    fn default() -> Self {
        Self {
            access_log: None,
            slow_ttft: None,
            slow_total: None,
            decisions: 1024,
            explain_share: 0.0,
            otlp_endpoint: None,
            otlp_sample_share: 1.0,
        }
    }
}

impl ObserveConfig {
    /// Settings that are a share of requests.
    pub(super) fn shares(&self) -> [(&'static str, f64); 2] {
        [
            ("explain_share", self.explain_share),
            ("otlp_sample_share", self.otlp_sample_share),
        ]
    }
}

/// Whether spans can be sent there: without TLS, which is the affair of a collector beside the router.
pub(super) fn is_endpoint(url: &str) -> bool {
    let uri = url.parse::<hyper::Uri>();
    uri.is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.host().is_some())
}
