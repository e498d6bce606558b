//! The identity of a request in logs and answers.

/// HTTP header and gRPC metadata: read from the client, made up where it sends none, returned with every answer.
pub(crate) const REQUEST_ID_KEY: &str = "x-request-id";
/// The longest id that is taken over.
const BYTES_MAX: usize = 128;

/// The client's id where it is short and plain, else a fresh one.
pub(crate) fn request_id(given: Option<&[u8]>) -> String {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte);
    given
        .filter(|id| (1..=BYTES_MAX).contains(&id.len()) && id.iter().all(is_plain))
        .and_then(|id| std::str::from_utf8(id).ok())
        .map_or_else(|| format!("req-{:016x}", fastrand::u64(..)), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_ids_are_kept_and_others_replaced() {
        assert_eq!(request_id(Some(b"trace-1.2:3_4")), "trace-1.2:3_4");
        let long = [b'a'; 129];
        for odd in [
            None,
            Some(&b""[..]),
            Some(b"a b"),
            Some(b"a\"b"),
            Some(b"\xff"),
            Some(&long),
        ] {
            let id = request_id(odd);
            assert!(id.starts_with("req-") && id.len() == 20, "{id}");
        }
    }
}
