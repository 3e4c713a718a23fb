module identity-auth-release

go 1.26.0
