//! What all requests share, and rows as the public API shows them.

use std::sync::Arc;

use control_plane_api::v2::{Branch, Database, Endpoint, EndpointDefaults, Project, Role};
use tokio::sync::Notify;
use wire::TokenVerifier;

use crate::{
    address::ProxyAddress,
    compute::Computes,
    storage::Storage,
    store::{
        self, Store,
        branches::BranchRow,
        catalog::{DatabaseRow, RoleRow},
        endpoints::EndpointRow,
        projects::ProjectRow,
    },
};

/// Postgres's major version of all projects.
pub const PG_VERSION: u32 = 15;
const REGION: &str = "local";
const PROVISIONER: &str = "dormouse";

/// What all requests share.
pub struct App {
    /// Metadata.
    pub store: Store,
    /// Branches' storage.
    pub storage: Arc<dyn Storage>,
    /// Computes.
    pub computes: Computes,
    /// How clients reach endpoints.
    pub address: ProxyAddress,
    /// SHA-256 of the admin's API key.
    pub admin_key_hash: [u8; 32],
    /// Checks services' tokens.
    pub verifier: TokenVerifier,
    /// Notified when the safekeepers that are wanted have changed.
    pub safekeepers_changed: Arc<Notify>,
    /// Garbage collection keeps at least so much history.
    pub gc_slack_seconds: u64,
}

impl App {
    /// A project as the API shows it.
    pub fn project(&self, row: ProjectRow) -> Project {
        Project {
            id: row.id,
            name: row.name,
            region_id: REGION.into(),
            platform_id: REGION.into(),
            provisioner: PROVISIONER.into(),
            pg_version: PG_VERSION,
            proxy_host: self.address.proxy_host().to_owned(),
            store_passwords: true,
            default_endpoint_settings: EndpointDefaults {
                suspend_timeout_seconds: Some(row.default_suspend_timeout_seconds),
            },
            history_retention_seconds: row.history_retention_seconds,
            settings: row.settings,
            creation_source: "api".into(),
            owner_id: "admin".into(),
            active_time_seconds: 0,
            cpu_used_sec: 0,
            compute_time_seconds: 0,
            written_data_bytes: 0,
            data_transfer_bytes: 0,
            data_storage_bytes_hour: 0,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }

    /// A branch as the API shows it.
    pub fn branch(&self, row: BranchRow) -> Branch {
        Branch {
            id: row.branch.branch,
            project_id: row.branch.project,
            parent_id: row.parent,
            parent_lsn: row.parent_lsn,
            parent_timestamp: row.parent_timestamp,
            name: row.name,
            current_state: row.state.as_str().into(),
            pending_state: None,
            state_changed_at: row.state_changed_at,
            logical_size: None,
            history_size: None,
            stored_size: None,
            creation_source: "api".into(),
            primary: row.is_default,
            default: row.is_default,
            protected: row.protected,
            cpu_used_sec: 0,
            compute_time_seconds: 0,
            active_time_seconds: 0,
            written_data_bytes: 0,
            data_transfer_bytes: 0,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }

    /// An endpoint as the API shows it, with its state of this moment.
    pub fn endpoint(&self, row: EndpointRow) -> Endpoint {
        let state = self.computes.state(&row);
        Endpoint {
            host: self.address.host(&row.id, false),
            id: row.id,
            project_id: row.branch.project,
            branch_id: row.branch.branch,
            name: row.name,
            kind: "read_write".into(),
            current_state: state.current.into(),
            pending_state: state.pending.map(str::to_owned),
            region_id: REGION.into(),
            autoscaling_limit_min_cu: 1.0,
            autoscaling_limit_max_cu: 1.0,
            settings: row.settings,
            pooler_enabled: false,
            pooler_mode: "transaction".into(),
            disabled: row.disabled,
            passwordless_access: false,
            creation_source: "api".into(),
            proxy_host: self.address.proxy_host().to_owned(),
            suspend_timeout_seconds: row.suspend_timeout_seconds,
            provisioner: PROVISIONER.into(),
            last_active: state.last_active.map(store::at).or(row.last_active),
            started_at: row.started_at,
            suspended_at: row.suspended_at,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// A role as the API shows it; the password only where it was just made.
pub fn role(row: RoleRow, with_password: bool) -> Role {
    Role {
        branch_id: row.branch,
        name: row.name,
        password: with_password.then_some(row.password),
        protected: false,
        created_at: row.created_at,
        updated_at: row.updated_at,
    }
}

/// A database as the API shows it.
pub fn database(row: DatabaseRow) -> Database {
    Database {
        id: row.id,
        branch_id: row.branch,
        name: row.name,
        owner_name: row.owner,
        created_at: row.created_at,
        updated_at: row.updated_at,
    }
}
