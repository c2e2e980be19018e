//! Styles, script and icon: compiled in, addressed by the hash of their content, cached for ever.
//!
//! Invariant: an address never serves two contents.

use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};

use super::Shared;
use super::problem::Problem;
use crate::keys::{hex, sha256};

struct Asset {
    name: String,
    etag: String,
    kind: &'static str,
    body: &'static [u8],
}

/// All assets with their hashed names.
pub struct Assets {
    style: Asset,
    script: Asset,
    icon: Asset,
}

impl Asset {
    fn new(stem: &str, extension: &str, kind: &'static str, body: &'static [u8]) -> Self {
        let hash = hex(&sha256(&[body])[..8]);
        Self { name: format!("{stem}.{hash}.{extension}"), etag: format!("\"{hash}\""), kind, body }
    }

    fn respond(&self, headers: &HeaderMap) -> Response {
        let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
        let fresh = known.is_some_and(|known| known.split(',').any(|tag| tag.trim() == self.etag || tag.trim() == "*"));
        let mut response = if fresh {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            ([(header::CONTENT_TYPE, self.kind)], self.body).into_response()
        };
        if let Ok(etag) = HeaderValue::from_str(&self.etag) {
            response.headers_mut().insert(header::ETAG, etag);
        }
        response
    }
}

impl Assets {
    /// Hashes what was compiled in.
    pub fn new() -> Self {
        Self {
            style: Asset::new("shop", "css", "text/css; charset=utf-8", include_bytes!("../../assets/shop.css")),
            script: Asset::new("shop", "js", "text/javascript; charset=utf-8", include_bytes!("../../assets/shop.js")),
            icon: Asset::new("icon", "svg", "image/svg+xml", include_bytes!("../../assets/icon.svg")),
        }
    }

    /// Address of the style sheet.
    pub fn style(&self) -> String {
        format!("/assets/{}", self.style.name)
    }

    /// Address of the script.
    pub fn script(&self) -> String {
        format!("/assets/{}", self.script.name)
    }

    /// Address of the icon.
    pub fn icon(&self) -> String {
        format!("/assets/{}", self.icon.name)
    }
}

impl Default for Assets {
    fn default() -> Self {
        Self::new()
    }
}

/// One asset, to be kept for a year.
pub async fn serve(
    State(shop): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let assets = [&shop.assets.style, &shop.assets.script, &shop.assets.icon];
    let asset = assets.into_iter().find(|asset| asset.name == name).ok_or_else(|| Problem::not_found("file"))?;
    let mut response = asset.respond(&headers);
    let forever = HeaderValue::from_static("public, max-age=31536000, immutable");
    response.headers_mut().insert(header::CACHE_CONTROL, forever);
    Ok(response)
}

/// The icon under the name that browsers guess.
pub async fn icon(State(shop): State<Shared>, headers: HeaderMap) -> Response {
    let mut response = shop.assets.icon.respond(&headers);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=86400"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_etag_is_not_sent_again() {
        let assets = Assets::new();
        let mut headers = HeaderMap::new();
        assert_eq!(assets.style.respond(&headers).status(), StatusCode::OK);
        headers.insert(header::IF_NONE_MATCH, assets.style.etag.parse().expect("a header"));
        assert_eq!(assets.style.respond(&headers).status(), StatusCode::NOT_MODIFIED);
        headers.insert(header::IF_NONE_MATCH, HeaderValue::from_static("\"other\""));
        assert_eq!(assets.style.respond(&headers).status(), StatusCode::OK);
    }
}
