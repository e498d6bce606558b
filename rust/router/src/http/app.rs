//! Which handler a request goes to.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Method, Response, header},
    middleware,
    response::IntoResponse as _,
    routing::{any, get},
};
use tower::ServiceExt as _;

use super::{HttpDoor, body::Refusal, health, ingress, models};
use crate::corridor::relay::Route;

/// What a listener serves.
#[derive(Clone)]
pub struct App {
    routes: Router,
    /// The door whose requests for answers do not take the way over `routes`: matching, boxed futures and extensions
    /// are a sixth of what the router does for a short answer.
    door: Option<Arc<HttpDoor>>,
}

impl From<Router> for App {
    fn from(routes: Router) -> Self {
        Self { routes, door: None }
    }
}

impl App {
    /// Answers one request.
    pub async fn answer(&self, request: Request) -> Response<Body> {
        if let Some(door) = &self.door
            && let Some(route) = generating(&request)
        {
            let answering = |request, record| async {
                let answered = door.generate(route, request, record).await;
                answered.unwrap_or_else(Refusal::into_response)
            };
            return ingress::enter(door, route.path(), request, answering).await;
        }
        let answered: Result<_, Infallible> = self.routes.clone().oneshot(request).await;
        match answered {
            Ok(response) => response,
        }
    }
}

/// The route, where it is one that generates.
fn generating(request: &Request) -> Option<Route> {
    let routes = [Route::Chat, Route::Completions];
    let path = request.uri().path();
    let found = routes.into_iter().find(|route| route.path() == path);
    found.filter(|_| request.method() == Method::POST)
}

impl HttpDoor {
    /// The door, ready to serve.
    pub(crate) fn into_app(self) -> App {
        let door = Arc::new(self);
        App {
            routes: routes(&door),
            door: Some(door),
        }
    }
}

fn routes(door: &Arc<HttpDoor>) -> Router {
    let for_clients = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::show))
        .route(Route::Chat.path(), any(post_only))
        .route(Route::Completions.path(), any(post_only))
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(door),
            ingress::let_in,
        ));
    let for_operators = Router::new()
        .route("/live", get(health::live))
        .route("/ready", get(health::ready))
        .route("/health", get(health::ready))
        .route("/metrics", get(health::metrics));
    for_clients
        .merge(for_operators)
        .fallback(ingress::no_such_route)
        .method_not_allowed_fallback(ingress::wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(door), enter))
        .with_state(Arc::clone(door))
}

async fn enter(
    State(door): State<Arc<HttpDoor>>,
    request: Request,
    next: middleware::Next,
) -> Response<Body> {
    let route = ingress::route_label(request.extensions().get());
    ingress::enter(&door, route, request, |request, _| next.run(request)).await
}

/// A route that generates, asked by another method.
async fn post_only() -> Response<Body> {
    let mut response = ingress::wrong_method().await.into_response();
    let allowed = HeaderValue::from_static("POST");
    response.headers_mut().insert(header::ALLOW, allowed);
    response
}
