//! Questions to an engine: is it well, what is it, which models has it.

use std::time::Duration;

use bytes::BytesMut;
use serde::Deserialize;
use tokio::time;

use super::{
    engine::{Engine, EngineKind, Outgoing, SendError},
    wire::{Connection, WireError},
};

/// The longest answer to a question. A list of a thousand adapters has some 200 KiB.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Most models of one engine that are taken in.
const MODELS_MAX: usize = 1024;

/// What an engine says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) kind: EngineKind,
    pub(super) models: Vec<EngineModel>,
}

/// A model that an engine has.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EngineModel {
    pub(super) id: String,
    pub(super) max_model_len: Option<u32>,
}

/// Why an engine is not taken to be well.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error(transparent)]
    Send(#[from] SendError),
    #[error("it did not answer in time")]
    Late,
    #[error("it answered {path} with status {status}")]
    Status { path: &'static str, status: u16 },
    #[error("its list of models cannot be read")]
    Models,
    #[error("it has no model")]
    NoModel,
}

impl From<WireError> for ProbeError {
    fn from(error: WireError) -> Self {
        Self::Send(error.into())
    }
}

/// Asks questions on one connection, which is watched in between.
pub(super) struct Prober<'a> {
    engine: &'a Engine,
    connection: Connection,
    timeout: Duration,
}

impl<'a> Prober<'a> {
    pub(super) async fn connect(engine: &'a Engine, timeout: Duration) -> Result<Self, ProbeError> {
        Ok(Self {
            connection: engine.connect(timeout).await?,
            engine,
            timeout,
        })
    }

    /// Returns when the connection ends.
    pub(super) async fn closed(&mut self) {
        self.connection.closed().await;
    }

    /// Whether it is well. Servers without a route for that have to list their models.
    pub(super) async fn health(&mut self) -> Result<(), ProbeError> {
        let (status, _) = self.get("/health").await?;
        let (path, status) = match status {
            404 | 405 | 501 => ("/v1/models", self.get("/v1/models").await?.0),
            status => ("/health", status),
        };
        match status {
            // One that asks for a key that we do not have is there, too.
            200..=299 | 401 | 403 => Ok(()),
            _ => Err(ProbeError::Status { path, status }),
        }
    }

    /// What it is, and which models it has.
    pub(super) async fn identify(&mut self) -> Result<Identity, ProbeError> {
        let path = "/v1/models";
        let (status, body) = self.get(path).await?;
        let only = self.engine.config.model.as_ref();
        let list = match status {
            200 => serde_json::from_slice::<ModelList>(&body).ok(),
            _ if only.is_none() => return Err(ProbeError::Status { path, status }),
            _ => None,
        };
        let owner = list
            .as_ref()
            .and_then(|list| Some(list.data.first()?.owned_by.clone()));
        let kind = match owner.flatten().as_deref().and_then(kind_of_owner) {
            Some(kind) => kind,
            None => self.kind_of_well().await?,
        };
        let mut listed = list.ok_or(ProbeError::Models).map(|list| {
            let model = |listed: ListedModel| EngineModel {
                id: listed.id,
                max_model_len: listed
                    .max_model_len
                    .or(listed.meta.and_then(|meta| meta.n_ctx)),
            };
            list.data
                .into_iter()
                .take(MODELS_MAX)
                .map(model)
                .collect::<Vec<_>>()
        });
        if let Some(only) = only {
            let known = listed
                .ok()
                .and_then(|models| models.into_iter().find(|model| model.id == *only));
            let assumed = || EngineModel {
                id: only.clone(),
                max_model_len: None,
            };
            listed = Ok(vec![known.unwrap_or_else(assumed)]);
        }
        let models = listed?;
        if models.is_empty() {
            return Err(ProbeError::NoModel);
        }
        Ok(Identity { kind, models })
    }

    /// What it is, if it is well. One that was only cut off answers when it is asked again; one that is well and does not
    /// answer on routes that it does not know is none of the kinds that have them.
    async fn kind_of_well(&mut self) -> Result<EngineKind, ProbeError> {
        if let Ok(kind) = self.kind().await {
            return Ok(kind);
        }
        self.health().await?;
        Ok(self.kind().await.unwrap_or_default())
    }

    /// What it is, by the routes that only its kind has.
    async fn kind(&mut self) -> Result<EngineKind, ProbeError> {
        for (path, key, kind) in [
            ("/get_server_info", "", EngineKind::Sglang),
            (
                "/props",
                "default_generation_settings",
                EngineKind::LlamaCpp,
            ),
            ("/info", "model_id", EngineKind::Tgi),
            ("/version", "version", EngineKind::Vllm),
        ] {
            let (status, body) = self.get(path).await?;
            let answer = serde_json::from_slice::<serde_json::Value>(&body);
            let is_object = answer.is_ok_and(|answer| {
                answer
                    .as_object()
                    .is_some_and(|answer| key.is_empty() || answer.contains_key(key))
            });
            if status == 200 && is_object {
                return Ok(kind);
            }
        }
        Ok(EngineKind::Unknown)
    }

    async fn get(&mut self, path: &'static str) -> Result<(u16, BytesMut), ProbeError> {
        let asking = async {
            if !self.connection.is_reusable() {
                self.connection = self.engine.connect(self.timeout).await?;
            }
            let request = Outgoing {
                method: "GET",
                path,
                headers: b"",
                body: b"",
            };
            let head = self
                .connection
                .send(&self.engine.head_of(&request), b"")
                .await?;
            let mut body = BytesMut::new();
            while self.connection.read_body(&mut body).await? {
                if body.len() > ANSWER_BYTES_MAX {
                    return Err(WireError::Malformed("the answer is too large").into());
                }
            }
            self.connection.rest();
            Ok((head.status, body))
        };
        time::timeout(self.timeout, asking)
            .await
            .map_err(|_| ProbeError::Late)?
    }
}

#[derive(Deserialize)]
struct ModelList {
    data: Vec<ListedModel>,
}

#[derive(Deserialize)]
struct ListedModel {
    id: String,
    #[serde(default)]
    max_model_len: Option<u32>,
    #[serde(default)]
    owned_by: Option<String>,
    #[serde(default)]
    meta: Option<ModelMeta>,
}

/// llama.cpp's.
#[derive(Deserialize)]
struct ModelMeta {
    #[serde(default)]
    n_ctx: Option<u32>,
}

fn kind_of_owner(owner: &str) -> Option<EngineKind> {
    match owner {
        "vllm" => Some(EngineKind::Vllm),
        "sglang" => Some(EngineKind::Sglang),
        "llamacpp" => Some(EngineKind::LlamaCpp),
        _ => None,
    }
}
