//! The page that shows an operator how the router is doing. It reads what `GET /admin/workers` and `GET /metrics` say
//! and can change nothing; its files hold no figures and no secrets, so they are handed out without the key, which the
//! page asks its reader for.

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Response, header},
    routing::get,
};

/// The page loads what this listener serves, talks to it alone, and is shown in no frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct File {
    path: &'static str,
    media_type: &'static str,
    text: &'static str,
}

const FILES: [File; 4] = [
    File {
        path: "/",
        media_type: "text/html; charset=utf-8",
        text: include_str!("dashboard/index.html"),
    },
    File {
        path: "/dashboard/style.css",
        media_type: "text/css; charset=utf-8",
        text: include_str!("dashboard/style.css"),
    },
    File {
        path: "/dashboard/figures.js",
        media_type: "text/javascript; charset=utf-8",
        text: include_str!("dashboard/figures.js"),
    },
    File {
        path: "/dashboard/page.js",
        media_type: "text/javascript; charset=utf-8",
        text: include_str!("dashboard/page.js"),
    },
];

/// The page's files.
pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |routes, file| {
        routes.route(file.path, get(move || async move { serve(file) }))
    })
}

/// Whether a path is one of the page's files.
pub(super) fn is_file(path: &str) -> bool {
    FILES.iter().any(|file| file.path == path)
}

fn serve(file: &File) -> Response<Body> {
    let mut response = Response::new(Body::from(file.text));
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, file.media_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A router that was replaced may have another page.
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}
