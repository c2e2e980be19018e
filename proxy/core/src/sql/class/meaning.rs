//! What a class means to a session, in one place: which statements weir answers or follows itself, and which commit.

use super::Class;

impl Class {
    /// BEGIN to savepoints: statements about the transaction block.
    pub fn controls_transaction(&self) -> bool {
        matches!(
            self,
            Class::Begin(_)
                | Class::Commit { .. }
                | Class::Rollback { .. }
                | Class::Savepoint(_)
                | Class::Release(_)
                | Class::RollbackTo(_)
                | Class::PrepareTransaction
                | Class::CommitPrepared
                | Class::RollbackPrepared
                | Class::SetTransaction(_)
        )
    }

    /// Changes a setting that outlives the statement.
    pub fn sets_session(&self) -> bool {
        matches!(self, Class::Set { .. } | Class::Reset(_) | Class::SetCharacteristics(_) | Class::Discard(_))
    }

    /// Statements that read or write rows and nothing else, as far as their first words tell.
    pub fn is_data(&self) -> bool {
        matches!(
            self,
            Class::Select | Class::Values | Class::Insert | Class::Update | Class::Delete | Class::With { .. }
        )
    }

    /// Statements that the session handles itself instead of planning them.
    pub fn is_control(&self) -> bool {
        self.controls_transaction()
            || self.sets_session()
            || self.keeps_to_one_server()
            || matches!(self, Class::SetConstraints | Class::Deallocate(_))
    }

    /// Controls the transaction or the settings of the server that runs it, and nothing that weir keeps by name.
    pub fn controls_server(&self) -> bool {
        self.controls_transaction()
            || matches!(
                self,
                Class::Set { .. } | Class::Reset(_) | Class::SetCharacteristics(_) | Class::SetConstraints
            )
    }

    /// What a transaction that has failed still accepts.
    pub fn ends_failed_transaction(&self) -> bool {
        matches!(self, Class::Commit { .. } | Class::Rollback { .. } | Class::RollbackTo(_) | Class::PrepareTransaction)
    }

    /// Makes or uses what lives in one server process (cursors, SQL prepared statements, LISTEN). Where there is one server it
    /// is a statement like any other: what it leaves behind pins the session to that process.
    pub fn keeps_to_one_server(&self) -> bool {
        matches!(
            self,
            Class::Prepare { .. }
                | Class::Execute { .. }
                | Class::Listen(_)
                | Class::Unlisten(_)
                | Class::Fetch { .. }
                | Class::Move { .. }
                | Class::CloseCursor(_)
        )
    }

    /// May commit by itself although no transaction command is in its text.
    pub fn commits_itself(&self) -> bool {
        matches!(self, Class::Call | Class::Do | Class::Execute { .. }) || !self.is_transactional()
    }

    /// Can it run inside a transaction block?
    pub fn is_transactional(&self) -> bool {
        !matches!(self, Class::Ddl(ddl) if !ddl.transactional)
    }

    /// May change what the catalogue says. Temporary objects are the session's own and not in it.
    pub fn changes_schema(&self) -> bool {
        match self {
            Class::Ddl(ddl) => !ddl.temporary && !matches!(ddl.what, "VACUUM" | "ANALYZE" | "CHECKPOINT" | "CLUSTER"),
            Class::SelectInto | Class::Do | Class::Call | Class::CommitPrepared => true,
            _ => false,
        }
    }

    /// A name for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Class::Ddl(ddl) => ddl.what,
            Class::Truncate => "TRUNCATE",
            _ => "this statement",
        }
    }
}
